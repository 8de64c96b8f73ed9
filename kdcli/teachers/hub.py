"""What torchvision and timm have of trained nets: their weights, and how these see images."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from kdcli import BadInput, code, failure
from kdcli.config import Model
from kdcli.teachers.weights import Weights, fit_weights


class Pretrained(NamedTuple):
    """The weights that a library has for a net: their name, how the net sees images, and its classes."""

    name: str
    mean: list[float]
    std: list[float]
    size: int
    classes: list[str]  # numbers where the library has no names


def pretrained(name: str) -> Pretrained:
    """What a library says of the weights of `torchvision:NAME` or `timm:NAME`; nothing is fetched. Raises BadInput when
    it has none."""
    library, _, which = name.partition(":")
    if library == "torchvision":
        weights = _of_torchvision(which)
        how = weights.transforms()
        if not hasattr(how, "crop_size"):
            raise BadInput(f"{name}: does not classify images")
        return Pretrained(str(weights), list(how.mean), list(how.std), how.crop_size[0], weights.meta["categories"])
    cfg = _of_timm(which)
    classes = [str(c) for c in range(cfg.num_classes)]
    source = cfg.hf_hub_id or cfg.url
    return Pretrained(source, list(cfg.mean), list(cfg.std), cfg.input_size[1], classes)


def _of_torchvision(which: str) -> Any:
    from torchvision import models

    try:
        return models.get_model_weights(which).DEFAULT
    except (ValueError, AttributeError):
        raise BadInput(f"torchvision:{which}: torchvision has no weights for it") from None


def _of_timm(which: str) -> Any:
    timm = code.library("timm", "timm")
    try:
        cfg = timm.get_pretrained_cfg(which)
    except RuntimeError as error:  # of weights of another name
        raise BadInput(f"timm:{which}: {failure(error)}") from None
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise BadInput(f"timm:{which}: timm has no weights for it")
    return cfg


def load(net: nn.Module, model: Model, classes: int, channels: int, fresh: str) -> list[str]:
    """Give a net the weights of its library, but those of its `fresh` layer: from where the library keeps them, else
    fetched. Returns which they are. Raises BadInput, with the file to fetch and its place, when they cannot be had."""
    library, _, which = (model.name or "").partition(":")
    if library == "torchvision":
        weights = _of_torchvision(which)
        file = _checkpoint(weights.url)
        with _fetching(model.name or "", weights.url, file):
            state = weights.get_state_dict(progress=False, check_hash=True)
        fit_weights(net, Weights(state, {}, []), file, fresh)
        return [f"Its weights are torchvision's {weights}."]
    import timm

    cfg = _of_timm(which)
    url, file = _of_hugging_face(cfg.hf_hub_id) if cfg.hf_hub_id else (cfg.url, _checkpoint(cfg.url))
    with _fetching(model.name or "", url, file):
        if not file.is_file():  # by torch, which tries once: the hub's own library retries for a minute
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), progress=False)
        more: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(file)}, **model.args}
        whole = timm.create_model(which, True, num_classes=classes, in_chans=channels, **more)
    net.load_state_dict(whole.state_dict())
    return [f"Its weights are timm's {cfg.hf_hub_id or cfg.url}."]


def _checkpoint(url: str) -> Path:
    """Where torch.hub keeps what it fetched from an address."""
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def _of_hugging_face(repository: str) -> tuple[str, Path]:
    """The weights in a repository of Hugging Face's hub: their address; their file in its cache or, of what is not
    there, the place where it is found."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    name = "model.safetensors"
    found = try_to_load_from_cache(repository, name)
    folder = repo_folder_name(repo_id=repository, repo_type="model")
    place = Path(constants.HF_HUB_CACHE, folder, "snapshots", "main", name)
    return hf_hub_url(repository, name), Path(found) if isinstance(found, str) else place


@contextmanager
def _fetching(name: str, source: str, file: Path) -> Iterator[None]:
    """Raise what fails while weights are fetched or read as BadInput that says how to have them."""
    try:
        with code.quiet():
            yield
    except Exception as error:  # whatever the network, the disk or the library raised
        if file.is_file():
            raise BadInput(f"{file}: cannot be read as the weights of {name} ({failure(error)[:200]})") from None
        why = f"its weights are not here and cannot be fetched ({failure(error)[:150]})"
        raise BadInput(f"{name}: {why}: fetch {source} elsewhere and put it at {file}") from None

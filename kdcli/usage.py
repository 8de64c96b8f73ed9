"""What was typed wrongly, in kd's own words: which option is meant, and what a value must be."""

from typing import Any

from kdcli.config import Distill, Train

# What other tools call them; in front of the keys of the sections `distill` and `train`.
OTHERS = {"alpha": "lambda1", "temperature": "T", "temp": "T", "tau": "T", "learning_rate": "lr", "bs": "batch_size"}
MUST = {
    "float_parsing": "must be a number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "greater_than_equal": "must be {ge} or more",
}


def told(error: Any, teaches: bool) -> str:
    """A usage error of typer's in one line; `teaches`: whether the command trains teachers."""
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", "")
    where, text = getattr(context, "command_path", "kd"), error.format_message().rstrip(".")
    if type(error).__name__ == "NoSuchOption" and context and (meant := _meant(option, context, teaches)):
        text = f"there is no option {option} here: write {meant}"
    elif "unexpected extra argument" in text:
        text = f"{text[0].lower()}{text[1:]}: quote what holds spaces"
    elif type(error).__name__ == "BadOptionUsage" and "requires an argument" in text:
        text = f"{option}: needs a value"
    elif hasattr(error.__cause__, "errors"):
        wrong = error.__cause__.errors()[0]
        name = next((opt for opt in error.param.opts if opt.startswith("-")), "")
        must = MUST.get(wrong["type"], "").format(**wrong.get("ctx", {}))
        if "is not one of " in wrong["msg"]:
            must = "must be one of " + wrong["msg"].partition("is not one of ")[2].rstrip(".").replace("'", "")
        typed = f"{name} {wrong['input']}".strip()
        text = f"{typed}: {must or wrong['msg']}"
    return f"kd: {text} (see {where} --help)"


def _meant(option: str, context: Any, teaches: bool) -> str:
    """The option of a command, or the key of the experiment file, that one which it does not have stands for."""
    word = option.lstrip("-").partition("=")[0].replace("-", "_")
    key, known = OTHERS.get(word, word), {opt for param in context.command.params for opt in param.opts}
    if f"--{key}" in known:
        return f"--{key}"
    section = "distill" if key in Distill.model_fields and word != "warmup" else ""
    if key in Train.model_fields and not section:
        section = "teacher.train" if teaches else "student.train"
    idle = context.command.name in ("evaluate", "cache") or (teaches and section == "distill")
    return f"--set {section}.{key}=…" if section and "--set" in known and not idle else ""

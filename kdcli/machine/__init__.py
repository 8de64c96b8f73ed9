"""Where a net is computed: a CPU or a GPU, several processes of one training, a Ray cluster."""

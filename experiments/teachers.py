"""Teachers for `distill`."""

from ml_collections import ConfigDict


def use_teacher(config: ConfigDict, teacher: ConfigDict, path: str) -> None:
    """Makes `config` a distillation from the model at `path`, which a run with the config `teacher` has trained."""
    encoder, decoder = teacher.model.encoder, teacher.model.decoder
    config.task = "distill"
    config.distill.path = path
    config.distill.encoder.update({key: encoder[key] for key in ("width", "depth", "heads", "hidden", "position")})
    config.distill.decoder.update({key: decoder[key] for key in ("width", "depth", "heads", "hidden", "kind")})

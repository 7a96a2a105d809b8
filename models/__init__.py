"""Models, executors and codecs. A user's own model imports `Model` from here."""

from inferbus.models.base import Model

__all__ = ["Model"]

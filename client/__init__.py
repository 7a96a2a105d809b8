"""What a service imports to ask a pipeline: `from inferbus.client import Client`."""

from inferbus.client.client import Client, RequestFailed
from inferbus.connectors.base import Misconfigured, TooLarge, Unavailable

__all__ = ["Client", "Misconfigured", "RequestFailed", "TooLarge", "Unavailable"]

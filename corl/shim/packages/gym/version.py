"""The version of gym whose interface this is."""

from corl.shim.options import current

VERSION = {"0.23": "0.23.1", "0.26": "0.26.2"}[current().gym_api]

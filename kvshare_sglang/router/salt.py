"""The tenant that the header ``X-KVShare-Salt`` names, in the body: the gateway drops the header.
Pure."""

from typing import Any

import orjson

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy.options import with_salt
from kvshare_sglang.router.prompts import OPTION_PATHS


def salted(body: Any, salt: str | None) -> Any:
    """A parsed body under the salt. Raises ConfigError where it has no place for one."""
    if salt is None:
        return body
    if not isinstance(body, dict):
        raise ConfigError("a body with X-KVShare-Salt", body, "a JSON object")
    return {**body, "cache_salt": with_salt(body.get("cache_salt"), salt)}


def written(path: str, body: bytes, salt: str) -> bytes:
    """A body under the salt. Raises ConfigError where the worker would not get to know it: the
    request would be answered among those of all other tenants."""
    if path not in OPTION_PATHS:
        places = ", ".join(OPTION_PATHS)
        raise ConfigError("the path of a request with X-KVShare-Salt", path, f"one of {places}")
    try:
        return orjson.dumps(salted(orjson.loads(body), salt))
    except (TypeError, orjson.JSONDecodeError):  # it is nested too deep to be written, or no JSON
        raise ConfigError("a body with X-KVShare-Salt", body[:20], "a JSON object") from None

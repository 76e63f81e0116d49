"""Read the widths of a layer from a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertprune.arch.blocks import ConfigKeys, Experts
from expertprune.errors import CheckpointError

_GROUPS = ("n_group", "num_expert_group")  # config keys: groups that a router first chooses among


def positive(config: Mapping[str, Any], key: str) -> int:
    """The positive whole number at a key; raises `CheckpointError` where there is none."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key!r} must be a positive whole number, found {value!r}")
    return value


def agreed(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """The number that some keys give, of which one is enough."""
    there = [key for key in keys if config.get(key) is not None] or [keys[0]]
    numbers = {positive(config, key) for key in there}
    if len(numbers) > 1:
        raise CheckpointError(f"config.json: {' and '.join(there)} disagree")
    return numbers.pop()


def heads_of(config: Mapping[str, Any], keys: ConfigKeys) -> tuple[int, int, int]:
    """Query heads, KV heads and the width of one.

    Raises:
        CheckpointError: they make no legal grouped-query attention.
    """
    hidden, query_heads = positive(config, keys.hidden), positive(config, keys.query_heads)
    kv_heads = positive(config, keys.kv_heads) if config.get(keys.kv_heads) is not None else query_heads
    head_dim = positive(config, keys.head_dim) if config.get(keys.head_dim) is not None else hidden // query_heads
    if query_heads % kv_heads:
        raise CheckpointError(
            f"config.json: {keys.query_heads} ({query_heads}) is no multiple of {keys.kv_heads} ({kv_heads})"
        )
    return query_heads, kv_heads, head_dim


def groups_of(config: Mapping[str, Any], experts: Experts, count: int) -> int:
    """The number of groups that a router first chooses among; 1 where it does not.

    Args:
        count: the number of routed experts.

    Raises:
        CheckpointError: the groups would not be equally large.
    """
    key = experts.groups.count if experts.groups is not None else None
    if key is None or config.get(key) is None:
        return 1
    groups = positive(config, key)
    if count % groups:
        raise CheckpointError(f"config.json: {count} routed experts are no multiple of {key} ({groups})")
    return groups


def least_experts(config: Mapping[str, Any], experts: Experts) -> int:
    """The fewest routed experts that a layer can have: as many as the router chooses for a token.

    Where it first chooses among groups, the chosen groups must hold them, and each group must have
    as many as the router looks at to rank it.
    """
    chosen, groups = positive(config, experts.per_token), experts.groups
    if groups is None or (config.get(groups.count) or 1) == 1:
        return chosen
    return max(groups.least, -(-chosen // positive(config, groups.chosen))) * positive(config, groups.count)


def grouped(config: Mapping[str, Any]) -> list[str]:
    """The keys of a config by which a router first chooses among several groups of routed experts."""
    return [key for key in _GROUPS if config.get(key) and positive(config, key) > 1]


def refuse_groups(config: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` for a router that chooses among groups that the family's file omits."""
    if keys := grouped(config):
        raise CheckpointError(
            f"config.json: {keys[0]!r} is {config[keys[0]]!r}: a router that chooses among groups of routed experts "
            "cannot lose single ones unless the family's file describes the groups"
        )

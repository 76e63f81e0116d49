"""Functions looked up by name, the project's own and those of installed plugins."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from expertprune.errors import SpecError, UsageError

T = TypeVar("T")
_LISTED = 50  # names, at most, in an error


def nearest(name: str, names: Iterable[str]) -> str:
    """`"; did you mean 'impact'?"`, or the list of valid names when none is near."""
    known = sorted(names)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    more = f" and {len(known) - _LISTED:,} more" if len(known) > _LISTED else ""
    return f"; valid: {', '.join(known[:_LISTED])}{more}" if known else ""


def plugins(group: str) -> list[EntryPoint]:
    """The entry points that installed distributions declare in a group, ordered by name."""
    return sorted(entry_points(group=group), key=lambda point: (point.name, point.value))


@contextlib.contextmanager
def loaded(plugin: EntryPoint) -> Iterator[Any]:
    """Import what an entry point names, for use in the block.

    Raises:
        UsageError: the import or the block failed; the message names the distribution and the entry
            point.
    """
    try:
        yield plugin.load()
    except Exception as error:
        distribution = f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist is not None else "unknown"
        raise UsageError(
            f"plugin {distribution}: entry point {plugin.name!r} ({plugin.value}) of group {plugin.group!r} cannot be "
            f"used: {type(error).__name__}: {error}; mend or uninstall the plugin"
        ) from error


class Registry(Mapping[str, T], Generic[T]):
    """Entries of one kind by name.

    Other packages add entries through entry points. Such an entry point names a module; importing
    that module registers its entries with the same decorator that the project's own entries use.
    The first lookup imports all modules of the group, once.

    Args:
        kind: what an entry is called in error messages, such as `"criterion"`.
        group: the group of entry points to import, such as `"expertprune.criteria"`; default: none.

    Raises:
        UsageError: at every lookup, if a plugin cannot be imported or takes a name that is taken.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._entries: dict[str, T] = {}
        self._modules: dict[str, str] = {}
        self._imported = group is None
        self._failure: UsageError | None = None

    def register(self, name: str, module: str | None = None) -> Callable[[T], T]:
        """Decorator that adds an entry.

        Args:
            module: where the entry was written, for messages; default: the entry's own
                `__module__`.

        Raises:
            ValueError: the name is taken; the message names both modules.
        """

        def add(entry: T) -> T:
            origin = module or str(getattr(entry, "__module__", "an unknown module"))
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice, by {self._modules[name]} and by {origin}")
            self._entries[name], self._modules[name] = entry, origin
            return entry

        return add

    def unknown(self, name: str) -> str:
        """The message for a name that is not registered."""
        return f"unknown {self.kind} {name!r}{nearest(name, self)}"

    def named(self, name: str, key: str) -> T:
        """The entry that a spec names under `key`; raises `SpecError` for an unknown name."""
        if name not in self:
            raise SpecError(f"{key}: {self.unknown(name)}")
        return self[name]

    def _all(self) -> dict[str, T]:
        if not self._imported and self.group is not None:
            self._imported = True  # first, since a plugin may itself look up an entry
            try:
                for plugin in plugins(self.group):
                    with loaded(plugin):
                        pass  # the import registers
            except UsageError as error:
                self._failure = error
        if self._failure is not None:
            raise self._failure
        return self._entries

    def __getitem__(self, name: str) -> T:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

"""Files and folders: written whole or not at all, read within limits, digests, disk room, and what ships."""

from expertprune.files.digests import digest_of
from expertprune.files.keeping import HOLDINGS, StoreEntry, duration, holdings, prune_store, remove_all_leftovers
from expertprune.files.outputs import (
    ADAPTER,
    CUT_ALONG,
    EXPERT,
    GENERATOR,
    GGUF,
    PAGE,
    PICTURE,
    PLAN,
    TIMING,
    OutputKind,
    check_inputs,
    check_output,
    check_parent,
    check_writable,
)
from expertprune.files.ownership import (
    age,
    disk_errors,
    is_leftover,
    locked,
    machine,
    one_at_a_time,
    remove_leftovers,
    scratch_folder,
    temporary_folder,
    working_folder,
)
from expertprune.files.places import (
    ADAPTER_WEIGHTS,
    CHANGES_FILE,
    COMPARISON_PAGE,
    EXPERT_FILE,
    MEMORY_VARIABLE,
    REPORT_PAGE,
    SPOOL_VARIABLE,
    THROUGHPUT_FILE,
    folder_size,
    numbered,
    require_room,
    require_rooms,
    shipped,
    size_in_bytes,
    store_folder,
    unused,
    user_path,
)
from expertprune.files.reading import (
    as_model,
    check_values,
    not_a_file,
    not_a_folder,
    opened,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_kept,
    read_model,
    read_object,
    read_text,
    read_yaml,
)
from expertprune.files.staging import (
    HASHED,
    file_digest,
    known_digest,
    staged_file,
    staged_folder,
    staged_output,
    to_json,
    write_file,
    write_json,
)
from expertprune.files.validation import problems_of

__all__ = [
    "ADAPTER", "ADAPTER_WEIGHTS", "CHANGES_FILE", "COMPARISON_PAGE", "CUT_ALONG", "EXPERT", "EXPERT_FILE",
    "GENERATOR", "GGUF", "HASHED", "HOLDINGS", "MEMORY_VARIABLE", "PAGE", "PICTURE", "PLAN", "REPORT_PAGE",
    "SPOOL_VARIABLE", "THROUGHPUT_FILE", "TIMING", "OutputKind", "StoreEntry", "age", "as_model",
    "check_inputs", "check_output", "check_parent", "check_values", "check_writable", "digest_of",
    "disk_errors", "duration", "file_digest", "folder_size", "holdings", "is_leftover", "known_digest",
    "locked", "machine", "not_a_file", "not_a_folder", "numbered", "one_at_a_time", "opened", "parse_json",
    "parse_yaml", "problems_of", "prune_store", "read_bytes", "read_json", "read_kept", "read_model",
    "read_object", "read_text", "read_yaml", "remove_all_leftovers", "remove_leftovers", "require_room",
    "require_rooms", "scratch_folder", "shipped", "size_in_bytes", "staged_file", "staged_folder",
    "staged_output", "store_folder", "temporary_folder", "to_json", "unused", "user_path", "working_folder",
    "write_file", "write_json",
]  # fmt: skip

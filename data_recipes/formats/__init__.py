"""Records from any known shape of data, and to JSONL, Parquet and LLaVA's JSON."""

from data_recipes.formats.faults import Fault
from data_recipes.formats.read import FORMATS, Format, read
from data_recipes.formats.write import WRITERS, write_jsonl, write_llava, write_parquet

__all__ = [
    "FORMATS",
    "WRITERS",
    "Fault",
    "Format",
    "read",
    "write_jsonl",
    "write_llava",
    "write_parquet",
]

"""A pre-flight check of training data: what would break, mislead or waste a run."""

from data_recipes.doctor.examine import Options, examine
from data_recipes.doctor.kinds import KINDS, Finding, Kind
from data_recipes.doctor.run import doctor
from data_recipes.doctor.summary import Summary

__all__ = ["KINDS", "Finding", "Kind", "Options", "Summary", "doctor", "examine"]

"""Records as a map-style data set whose memory does not grow with the pictures."""

from torch.utils.data import Dataset

from vlm.messages import Record
from vlm.record_files import RecordFiles


class RecordDataset(RecordFiles, Dataset[Record]):
    """The records of JSONL and Parquet files, read when they are asked for."""

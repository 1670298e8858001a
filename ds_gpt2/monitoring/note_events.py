"""A copy in TensorBoard of the user's notes about a run.

It is written to a separate event file, so that the event file of the training process is unchanged.
"""

from __future__ import annotations

import io
import itertools
import time
from datetime import datetime
from pathlib import Path

from ds_gpt2.common import files
from ds_gpt2.run_dir.notes import TIME, Note

TAG = "notes"  # in TensorBoard


def show_in_tensorboard(notes: list[Note], directory: Path) -> None:
    """Write all ``notes`` to a new event file in ``directory`` and delete the earlier event files there.

    TensorBoard's fast data loader retains one text per step, and discards later steps if a step decreases. So the notes
    of a step are joined to one text, and all notes are written again in the order of their steps.

    Raises:
        OSError: the file cannot be written.
    """
    directory.mkdir(exist_ok=True)
    earlier = list(directory.glob("*tfevents*"))
    file = directory / f"events.out.tfevents.{time.time_ns():020d}.notes"
    files.replace_file(file, _events(notes), hidden=True)  # TensorBoard reads every file with "tfevents" in its name
    for old in earlier:
        old.unlink(missing_ok=True)


def _events(notes: list[Note]) -> bytes:
    """Return the content of an event file with one record per step."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    records = RecordWriter(content)
    records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
    for step, group in itertools.groupby(sorted(notes, key=_step), key=_step):
        at_step = list(group)
        text = "\n\n".join(f"**{note.time}**\n\n{note.text}" for note in at_step)
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        value = Summary.Value(tag=TAG, metadata=create_summary_metadata(TAG, None), tensor=tensor)
        written = datetime.strptime(at_step[-1].time, TIME).timestamp()
        records.write(Event(wall_time=written, step=step, summary=Summary(value=[value])).SerializeToString())
    return content.getvalue()


def _step(note: Note) -> int:
    return note.step

"""A worker: a model that is loaded once, and the processes that read photos for it."""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING

from batchcap.captioning.options import WorkerSettings
from batchcap.model.runtime import choose_execution
from batchcap.photos.images import load_image
from batchcap.photos.reader_pool import Readers
from batchcap.process.memory import keep_freed_memory
from batchcap.rows.parquet import Row
from batchcap.schema import ImageRef

if TYPE_CHECKING:  # TensorFlow is not to start before the processes that read
    from batchcap.model.captioner import Captioner


class CaptionWorker:
    """Photos to rows, for as long as there are photos. Begins with its processes and TensorFlow.

    `readers` is how many processes read photos; `progress` is that of `Readers`.

    Raises:
        UsageError: the runtime or the precision is none that this machine has.
        ModelError: at the first use of the model, that the directory is wrong.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        readers: int,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.settings = settings
        keep_freed_memory()
        # First, since its processes start while TensorFlow does.
        load = partial(load_image, settings=settings.load)
        self._read = Readers(load, readers, settings.reader_timeout_s, progress)
        try:
            self.execution = choose_execution(settings.runtime, settings.precision)
        except BaseException:
            self.close()
            raise

    @cached_property
    def captioner(self) -> "Captioner":
        """The model, loaded when it is first asked for."""
        from batchcap.model.captioner import load_captioner

        settings = self.settings
        return load_captioner(settings.model, self.execution, compiled=settings.compiled)

    @property
    def metadata(self) -> dict[str, str]:
        """What a file of its rows says of how they were made."""
        grid = "{}x{}".format(*self.captioner.grid)
        return {"batchcap.runtime": self.execution.runtime, "batchcap.grid": grid}

    def __call__(
        self,
        refs: Iterable[ImageRef],
        reusable: Callable[[str], Row | None] = lambda _sha256: None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[list[Row]]:
        """Rows in the order of `refs`, a batch at a time; as `run_locally` makes them."""
        from batchcap.captioning.local_engine import Job, run_locally

        settings = self.settings
        job = Job(
            *(self.captioner, settings.decode, settings.batch_size, settings.attention),
            *(settings.run_id, self._read, reusable, is_over),
        )
        return run_locally(refs, job)

    def close(self) -> None:
        """End the processes that read."""
        self._read.stop()

"""How decoding rejects a file: the exception that carries a rejection, and common rejections."""

import io

from batchcap.schema import ErrorType, Rejection

# Chunks, segments and blocks: Pillow walks them one by one and keeps most. Without a limit, 5 MB of
# the shortest take 2 s and 220 MB, and MAX_FILE_BYTES 200 times as much. A PNG of MAX_PIXELS, 64
# bits each, in chunks of the usual 8 KiB has half as many.
MAX_PARTS = 200_000
READS_PER_PART = 3  # length, body and checksum


class RejectionError(Exception):
    """Carries a rejection to `load_image`, with the file's size and time if known."""

    def __init__(
        self,
        error_type: ErrorType,
        message: str,
        file_size: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rejection = Rejection(error_type, message)
        self.file_size, self.mtime_ns = file_size, mtime_ns


class PatientFile(io.BytesIO):
    """A file in memory that raises after too many reads."""

    reads_left = MAX_PARTS * READS_PER_PART

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise too_many_parts()
        return super().read(size)


def truncated() -> RejectionError:
    """Return the error for a file that ends early."""
    return RejectionError(
        ErrorType.TRUNCATED, "The file ends before the photo does; copy or download it again."
    )


def too_many_parts() -> RejectionError:
    """Return the error for a file with more than MAX_PARTS parts."""
    return RejectionError(
        ErrorType.TOO_LARGE, f"The file has more than {MAX_PARTS:,} parts; save the photo again."
    )


def corrupt(format_name: str, reason: str) -> RejectionError:
    """Return the error for a damaged file; `reason` is the decoder's message."""
    return RejectionError(
        ErrorType.CORRUPT,
        f"The {format_name} data is damaged ({one_line(reason)}); replace the file.",
    )


def one_line(text: str) -> str:
    """Return a decoder's message, shortened, without unprintable characters."""
    return "".join(c if c.isprintable() else " " for c in text)[:120].strip()

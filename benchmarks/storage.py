"""Large saves out of a bucket beside the same out of a folder.

The bucket's service is a test's, in Python and on this machine: what it costs is in the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

from interpose import LanguageModel
from lab import TINY, served, tiny, tiny_server
from table import Row, mb_s
from timing import Effort, interleaved, ratio, seconds
from transfer import save


def measure(effort: Effort) -> Iterator[Row]:
    from buckets import run_s3

    folder = tiny_server()
    with run_s3() as s3:
        env = {**s3.env(), "INTERPOSE_SERVER_BLOBS": s3.bucket()}
        with served(TINY, tiny(), env) as bucket:
            models = [LanguageModel(TINY, host=server.host, api_key=server.key) for server in (bucket, folder)]
            for size, rounds in ((64 << 20, effort.transfers), (512 << 20, effort.large_transfers)):
                works = [partial(save, model, size) for model in models]
                ours, beside = interleaved(rounds, *(partial(seconds, work) for work in works), warm=1)
                yield Row(
                    f"a save of {size >> 20} MB by a bucket", mb_s(size, median(ours)),
                    f"by a folder {mb_s(size, median(beside))}", f"{1 / ratio(ours, beside):.2f} of its rate",
                    "the bucket's service is a test's",
                )  # fmt: skip

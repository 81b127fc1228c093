"""Files to and from an object store, through streaming's own connections: the same URLs and variables as in training."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanogpt.cache import TIMEOUT_S, one_line  # which also mends the timeouts of S3
from nanogpt.errors import UserError
from streaming.base.storage.download import CloudDownloader
from streaming.base.storage.upload import CloudUploader

ATTEMPTS = 5
uploaders = {}  # a connection for each URL


def fetch(remote: str, local: Path) -> bool:
    """Gets a small file; False: it is not there. UserError: nobody knows."""
    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        CloudDownloader.direct_download(remote, str(local), TIMEOUT_S)
        return True
    except Exception as error:  # of as many kinds as there are stores
        if isinstance(error, FileNotFoundError) or any(sign in str(error).lower() for sign in ("not found", "404", "nosuchkey")):
            return False
        raise UserError(f"{remote}: cannot be reached ({one_line(error)}); are URL and credentials right?") from None


def upload(paths: list[Path], folder: Path, url: str):
    """Puts files of `folder` to the same names under `url`, and removes them here. UserError: one could not be put there."""
    try:
        if url not in uploaders:
            logging.getLogger("streaming").setLevel(logging.ERROR)  # it warns of a folder that is not empty
            uploaders[url] = CloudUploader.get((str(folder), url), retry=ATTEMPTS, exist_ok=True)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda path: uploaders[url].upload_file(str(path.relative_to(folder))), paths))
    except Exception as error:
        raise UserError(f"{url}: cannot be written ({one_line(error)}); are URL and credentials right? What is done is kept "
                        "here, and the same command goes on") from None

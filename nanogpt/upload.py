"""Files to and from an object store, through streaming's own connections: the same URLs and variables as in training."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanogpt.cache import NotThere, download
from nanogpt.errors import UserError, one_line
from streaming.base.storage.upload import CloudUploader

ATTEMPTS = 5
uploaders = {}  # a connection for each (folder, URL)


def fetch(name: str, folder: Path, url: str) -> bool:
    """Gets a small file of `url` into `folder`; False: it is not there. UserError: nobody knows, or there is no such bucket."""
    try:
        _uploader(folder, url)  # asks for the bucket
    except Exception as error:  # of as many kinds as there are stores
        raise UserError(f"{url}: cannot be reached ({one_line(error)}); are URL and credentials right?") from None
    try:
        download(f"{url}/{name}", folder / name)
    except NotThere:
        return False
    return True


def upload(paths: list[Path], folder: Path, url: str):
    """Puts files of `folder` to the same names under `url`, and removes them here. UserError: one could not be put there."""
    try:
        to = _uploader(folder, url)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda path: to.upload_file(str(path.relative_to(folder))), paths))
    except Exception as error:
        raise UserError(f"{url}: cannot be written ({one_line(error)}); are URL and credentials right? What is done is kept "
                        "here, and the same command goes on") from None


def _uploader(folder: Path, url: str) -> CloudUploader:
    if (folder, url) not in uploaders:
        logging.getLogger("streaming").setLevel(logging.ERROR)  # it warns of a folder that is not empty
        uploaders[folder, url] = CloudUploader.get((str(folder), url), retry=ATTEMPTS, exist_ok=True)
    return uploaders[folder, url]

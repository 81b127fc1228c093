"""Datasets of the Hugging Face hub, and folders laid out like one, as documents.py reads them.

Parquet files, which most datasets have, are taken as they are: downloaded, or with `streaming` read in place, where their
footers tell how many rows there are. Any other kind goes through load_dataset, and its Arrow files are read.
"""

import contextlib
import functools
import json
import os

from nanogpt.documents import File, Inputs, Source, stat_file
from nanogpt.errors import UserError, one_line

CONNECT_S = 10  # seconds until the hub has to answer


class HuggingFace(Inputs):
    """A split of a dataset of the hub, or of a folder."""

    seekable = True

    def __init__(self, name: str, config: str | None = None, split: str = "train", column: str = "text",
                 revision: str | None = None, streaming: bool = False, errors: str = "strict"):
        """Of the hub, this only asks for the commit of a revision. UserError: no such dataset or revision, no way there."""
        self.local, self.streaming, self.items, self.newest, commit = os.path.isdir(name), streaming, None, 0.0, None
        if self.local and revision:
            raise UserError("--revision: is of a dataset of the hub, and a folder has none; leave it out")
        if self.local:
            paths = [os.path.join(folder, file) for folder, _, files in os.walk(name) for file in files]
            self.newest = max((stat_file(path, "")[1] for path in paths), default=0.0)
        self.name, commit = (name, None) if self.local else _find_dataset(name, revision)
        self.options = {"kind": "hugging face", "paths": [name], "config": config, "split": split, "column": column,
                        "revision": commit, "errors": errors}
        self.prefix = f"hf://datasets/{self.name}@{commit}/"

    @functools.cached_property
    def _files(self) -> list[File]:  # type: ignore[override]  # an attribute elsewhere
        """The data files of the split, by the rules of `datasets`: looked for when somebody asks, since it takes seconds."""
        from datasets import DownloadConfig, load_dataset_builder
        from datasets.packaged_modules.parquet.parquet import Parquet
        (where,), config, split, commit = (self.options[key] for key in ("paths", "config", "split", "revision"))
        try:
            builder = load_dataset_builder(self.name, config, revision=commit, download_config=DownloadConfig(max_retries=1))
        except Exception as error:  # datasets raises whatever comes up
            raise UserError(f"{where}: cannot be opened ({one_line(error)}); --hf-config names one of its configurations"
                            ) from None
        data_files = builder.config.data_files or {}
        if split not in data_files:
            raise UserError(f"--split: {where} has no {split!r}, but {', '.join(map(str, data_files)) or 'none'}")
        paths = [str(path) for path in data_files[split]]
        self.parquet = isinstance(builder, Parquet) and all(path.lower().endswith(".parquet") for path in paths)
        if self.streaming and not self.parquet:
            raise UserError(f"--streaming: reads Parquet files in place, and {where} has files like "
                            f"{os.path.basename(paths[0])}; leave it out")
        if self.local:
            return [stat_file(path, "parquet")[0] for path in paths]
        if not all(path.startswith(self.prefix) for path in paths):
            raise UserError(f"{where}: has data files elsewhere, like {paths[0]}; download them, and take "
                            "tools/convert_text_to_mds.py")
        sizes = self._sizes([path[len(self.prefix):] for path in paths])
        return [File(path, "parquet", "", sizes[path[len(self.prefix):]], -1, False) for path in paths]

    def _sizes(self, names: list[str]) -> dict[str, int]:
        """Of files of the hub."""
        from huggingface_hub import HfApi
        try:
            infos = [info for start in range(0, len(names), 500)
                     for info in HfApi().get_paths_info(self.name, names[start:start + 500], repo_type="dataset",
                                                        revision=self.options["revision"])]
        except Exception as error:  # of whichever HTTP library
            raise UserError(f"{self.name}: cannot be listed ({one_line(error)}); the same command tries again") from None
        return {info.path: info.size for info in infos}  # type: ignore[union-attr]  # of files, no folders

    def scan(self, val_fraction, cuttable, progress=True):
        files = self._files
        names = [[file.path[len(self.prefix):], file.size] for file in files]
        try:
            if not self.parquet:
                from datasets import load_dataset
                config, split, commit = (self.options[key] for key in ("config", "split", "revision"))
                data = load_dataset(self.name, config, split=split, revision=commit)
                files = [stat_file(file["filename"], "arrow")[0] for file in data.cache_files]
            elif not self.local and not self.streaming:
                from huggingface_hub import snapshot_download
                folder = snapshot_download(self.name, repo_type="dataset", revision=self.options["revision"],
                                           allow_patterns=[name.replace("[", "[[]") for name, _ in names])
                files = [stat_file(os.path.join(folder, name), "parquet")[0] for name, _ in names]
        except UserError:
            raise
        except Exception as error:  # of datasets, or of whichever HTTP library
            raise UserError(f"{self.name}: cannot be downloaded ({one_line(error)}); the same command goes on where it was"
                            ) from None
        source = Source(self.options, files)
        source._scan(val_fraction, cuttable, progress, None if self.local else _digest(names))
        source.identity |= {"files": len(names), "bytes": self.bytes}
        return source


def _digest(names: list) -> str:
    """Of the names and sizes of the files of a revision, which fix their contents."""
    import xxhash
    return xxhash.xxh3_128(json.dumps(names).encode()).hexdigest()


def _find_dataset(name: str, revision: str | None) -> tuple[str, str]:
    """The full name of a dataset of the hub, and the commit of a branch or tag. UserError: there is none, or no network."""
    from huggingface_hub import HfApi, errors
    where = name + (f"@{revision}" if revision else "")
    try:
        with refusals(where, "dataset"):
            info = HfApi().dataset_info(name, revision=revision, timeout=CONNECT_S)
            return info.id, info.sha
    except UserError:
        raise
    except errors.HFValidationError:
        raise UserError(f"{where}: is neither a folder nor the name of a dataset on the hub, like Skylion007/openwebtext"
                        ) from None
    except Exception as error:  # of whichever HTTP library
        raise UserError(f"{where}: the hub cannot be reached ({one_line(error)}); where it can, run huggingface-cli download "
                        f"{name} --repo-type dataset --local-dir DIR, copy DIR here, and give that folder as --hf-dataset"
                        ) from None


@contextlib.contextmanager
def refusals(where: str, kind: str):
    """What the hub refuses inside is told as UserError. where: the name; kind: "model" or "dataset"."""
    from huggingface_hub import errors
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{where}: its owner lets only some in; ask for access on the hub, and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{where}: there is no such branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{where}: there is no such {kind} on the hub, or it is private: then set HF_TOKEN") from None

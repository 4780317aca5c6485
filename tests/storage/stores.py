"""What tests of runs in an object store share: the run's URI, its files, its ranks."""

import os
import signal

from tests.conftest import names, tiny_settings
from yuzogpt import runs
from yuzogpt.storage.run_storage import ObjectStorage
from yuzogpt.training import launch

URI = "s3://runs/team/run"
OF_AWS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


class Environment:
    """Gives each rank a cache of its own, as on separate nodes, and the address of the store."""

    def __init__(self, caches):
        self.caches = caches
        self.values = {name: os.environ[name] for name in OF_AWS}

    def __call__(self, rank):
        os.environ.update(self.values, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ["XDG_CACHE_HOME"] = str(self.caches / str(rank))


class KillAt(Environment):
    """Kills a rank when it is about to upload a file of a checkpoint."""

    def __init__(self, caches, file):
        super().__init__(caches)
        self.file = file

    def __call__(self, rank):
        super().__call__(rank)
        real = ObjectStorage.upload

        def upload(storage, source=None):
            if storage.uri.endswith(self.file):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(storage, source)

        ObjectStorage.upload = upload


def download(s3, directory):
    """Copy the run to a directory, past the code that is tested."""
    for name in names(s3):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        s3.download_file("runs", f"team/run/{name}", str(directory / name))
    return directory


def put(s3, name, content):
    s3.put_object(Bucket="runs", Key=f"team/run/{name}", Body=content)


def get(s3, name):
    return s3.get_object(Bucket="runs", Key=f"team/run/{name}")["Body"].read()


def train(corpus_dir, out_dir, *flags):
    """Train in this process, as the command does."""
    launch.run_here(runs.check(tiny_settings(corpus_dir, out_dir, "--dropout=0.1", *flags)))


def files_below(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")} - {
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_dir()
    }

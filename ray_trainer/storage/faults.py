"""What errors of storage mean: which of them pass, and what a user can do about the others."""

import errno
import os
import re
import shutil
from pathlib import Path

#: Numbers of the system that a local disk, NFS or another network file system gives for what may pass by itself.
TRANSIENT_ERRNOS = frozenset(
    {
        errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ENOLCK, errno.EREMOTEIO,
        errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENOTCONN, errno.EPIPE,
        errno.ESHUTDOWN, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    }
)  # fmt: skip
#: What S3 calls it, in the words of the AWS SDK.
TRANSIENT_S3_CODES = frozenset(
    {
        "NETWORK_CONNECTION", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "THROTTLING", "REQUEST_TIMEOUT",
        "REQUEST_EXPIRED", "CLIENT_SIGNING_FAILURE",
    }
)  # fmt: skip
#: And Google Cloud Storage.
TRANSIENT_GCS_CODES = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL"})
TRANSIENT_HTTP_STATUS = frozenset({408, 429, 500, 502, 503, 504})

_S3_CODE = re.compile(r"AWS Error ([A-Z_0-9]+)")
_GCS_CODE = re.compile(r"google::cloud::Status\((?:k)?([A-Z_]+)")
_HTTP_STATUS = re.compile(r"HTTP status (\d{3})")

_ADVICE = {
    errno.EROFS: "the file system is read-only; mount it for writing, or name another directory",
    errno.EACCES: "this user may not write or read there; change the permissions, or name another directory",
    errno.EPERM: "this user may not do that there; change the permissions, or name another directory",
    errno.EDQUOT: "the quota is used up; delete what is not needed, or ask for more",
    errno.EFBIG: "the file system or a limit (ulimit -f) does not allow files of this size",
    errno.EMFILE: "this process has too many files open; raise the limit (ulimit -n)",
    errno.ENFILE: "the machine has too many files open; raise fs.file-max",
    errno.ESTALE: "the network file system has lost the file; mount it anew if that stays",
    errno.ENOTCONN: "the network file system is not connected; mount it anew if that stays",
    errno.EIO: "the disk or the network file system failed; look at the system's log if that stays",
}
_S3_ADVICE = {
    "ACCESS_DENIED": "these credentials may not do that; give them access to the bucket",
    "NO_SUCH_BUCKET": "there is no such bucket; create it, or correct its name",
    "INVALID_ACCESS_KEY_ID": "the access key is not known; check AWS_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
    "INVALID_CLIENT_TOKEN_ID": "the credentials are not known; check AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN",
    "MISSING_AUTHENTICATION_TOKEN": "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "REQUEST_TIME_TOO_SKEWED": "the clock of this machine is wrong; set it",
    "NETWORK_CONNECTION": "the server cannot be reached; check the network and AWS_ENDPOINT_URL",
}


def is_transient(error: OSError) -> bool:
    """Whether the same call may succeed a little later."""
    if error.errno is not None:
        return error.errno in TRANSIENT_ERRNOS
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    text = str(error)
    status = _HTTP_STATUS.search(text)
    return (
        (status is not None and int(status[1]) in TRANSIENT_HTTP_STATUS)
        or _code(_S3_CODE, text) in TRANSIENT_S3_CODES
        or _code(_GCS_CODE, text) in TRANSIENT_GCS_CODES
    )


def advice(error: OSError, path: str) -> str:
    """What to do about an error of storage, as half a sentence; empty where the error says it itself."""
    if error.errno == errno.ENOSPC:
        return f"{_space(path)}; delete what is not needed, or keep fewer checkpoints (keep_last_n, keep_best_k)"
    if error.errno is not None:
        return _ADVICE.get(error.errno, "")
    return _S3_ADVICE.get(_code(_S3_CODE, str(error)), "")


def _code(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1] if match else ""


def _space(path: str) -> str:
    """How much room there is, as far as this machine can tell."""
    for place in (Path(path), *Path(path).parents):
        if place.is_dir():
            usage = shutil.disk_usage(place)
            if os.statvfs(place).f_favail == 0 and usage.free:
                return "no more files can be created there, though there is room"
            return f"{usage.free / 1e6:.1f} of {usage.total / 1e6:.0f} MB are free"
    return "there is no room"

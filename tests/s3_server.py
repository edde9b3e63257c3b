"""A server that speaks S3, on this machine, which a test can make slow or let fail.

It is moto behind real HTTP, in threads of the test's own process, so that workers in other processes reach it too.
The fixture is `s3_server` in conftest.py.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

ACCESS_KEY, SECRET_KEY, REGION = "testing-key", "testing-secret", "us-east-1"
_UNKNOWN_KEY = (
    b"<Error><Code>InvalidAccessKeyId</Code>"
    b"<Message>The AWS Access Key Id you provided does not exist in our records.</Message></Error>"
)
_BUSY = b"<Error><Code>ServiceUnavailable</Code><Message>Come back later.</Message></Error>"

Fault = Callable[[str, str], bool]


class S3Server:
    """The server and its faults.

    Attributes:
        endpoint: ``host:port``.
        delay_s: how long each request waits before it is worked on.
        refused: ``(method, path)`` of each request that was answered with an error on purpose.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self._fault: Fault = lambda method, path: False
        self.endpoint = f"127.0.0.1:{self._server.port}"
        self.delay_s = 0.0
        self.refused: list[tuple[str, str]] = []

    @property
    def environment(self) -> dict[str, str]:
        """With these variables set, a plain ``s3://bucket/path`` is on this server."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": f"http://{self.endpoint}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def new_bucket(self) -> str:
        """The name of a bucket that was not there before."""
        name = f"bucket-{uuid.uuid4().hex[:8]}"
        self.client().create_bucket(Bucket=name)
        return name

    def uri(self, path: str) -> str:
        """A URI that opens without any variable set; ``path`` begins with the bucket."""
        query = f"scheme=http&endpoint_override={self.endpoint}&region={REGION}"
        return f"s3://{ACCESS_KEY}:{SECRET_KEY}@{path}?{query}"

    def client(self) -> Any:
        """Boto's, to look from another side at what is there."""
        return boto3.client(
            "s3",
            endpoint_url=f"http://{self.endpoint}",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name=REGION,
        )

    @contextmanager
    def refusing(self, fault: Fault = lambda method, path: True) -> Iterator[None]:
        """Answer the requests that ``fault(method, path)`` picks with 503, as an overloaded S3 does."""
        self._fault = fault
        try:
            yield
        finally:
            self._fault = lambda method, path: False

    def refuse_for(self, seconds: float) -> None:
        """Answer everything with 503 for so long, beginning with the next request."""
        ends_at: list[float] = []

        def fault(method: str, path: str) -> bool:
            ends_at[:] = ends_at or [time.monotonic() + seconds]
            return time.monotonic() < ends_at[0]

        self._fault = fault

    def recover(self) -> None:
        """Be without faults again, and forget those that there were."""
        self._fault = lambda method, path: False
        self.delay_s = 0.0
        self.refused.clear()

    def close(self) -> None:
        """Stop; what was stored is gone."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if self.delay_s:
            time.sleep(self.delay_s)
        if self._fault(method, path):
            self.refused.append((method, path))
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
            return [_BUSY]
        if f"Credential={ACCESS_KEY}/" not in environ.get("HTTP_AUTHORIZATION", ""):  # moto would let anybody in
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [] if method == "HEAD" else [_UNKNOWN_KEY]
        return self._moto(environ, start_response)  # type: ignore[no-any-return]

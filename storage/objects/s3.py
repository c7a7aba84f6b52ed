"""`s3://`: MinIO first, and every other S3 that passes the probe.

obstore carries the data; the minio SDK makes and checks the bucket. Credentials come from the
environment (AWS_ACCESS_KEY_ID, MINIO_ACCESS_KEY), ~/.aws/credentials, or the machine's role; never
from the URL, which is written into logs and manifests.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import UTC, timedelta
from typing import Any
from urllib.parse import parse_qs, urlencode, urlparse

import urllib3
from minio.credentials.providers import (
    AWSConfigProvider,
    ChainedProvider,
    EnvAWSProvider,
    EnvMinioProvider,
    IamAwsProvider,
    Provider,
)
from minio.error import MinioException
from obstore.store import S3Store as _ObstoreS3

from populace.storage.errors import InvalidInput
from populace.storage.objects.cloud import ObstoreStore
from populace.storage.objects.contract import ObjectStore

logger = logging.getLogger(__name__)

AWS = "https://s3.amazonaws.com"

SUSPENDED = "Suspended"

ABORT_UPLOADS_AFTER_DAYS = 7

_CREDENTIALS_HELP = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or put them into "
    "~/.aws/credentials (profile: AWS_PROFILE)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Location:
    """What an `s3://` URL says."""

    bucket: str
    prefix: str
    endpoint: str | None
    """None: AWS itself."""
    region: str

    @staticmethod
    def parse(url: str) -> S3Location:
        parsed = urlparse(url)
        if parsed.username or parsed.password:
            raise InvalidInput(
                f"store s3://…@{parsed.hostname}: a URL must not hold credentials; "
                f"{_CREDENTIALS_HELP}"
            )
        if not parsed.hostname or parsed.port is not None:
            raise InvalidInput(
                f"store is {url!r}; write s3://BUCKET[/PREFIX][?endpoint=http://HOST:PORT&region=NAME]"
            )
        query = parse_qs(parsed.query, keep_blank_values=True)
        if unknown := set(query) - {"endpoint", "region"}:
            raise InvalidInput(
                f"store {parsed.netloc}: unknown {sorted(unknown)} in the URL; use endpoint and "
                "region"
            )
        environment = os.environ
        endpoint = query.get(
            "endpoint",
            [environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")],
        )[0]
        if endpoint is not None and "@" in urlparse(endpoint).netloc:
            raise InvalidInput(
                f"store {parsed.netloc}: an endpoint must not hold credentials; {_CREDENTIALS_HELP}"
            )
        if endpoint is not None and urlparse(endpoint).scheme not in ("http", "https"):
            raise InvalidInput(
                f"store {parsed.netloc}: endpoint is {endpoint!r}; give http://HOST:PORT or https://…"
            )
        return S3Location(
            bucket=parsed.hostname,
            prefix=parsed.path.strip("/"),
            endpoint=endpoint,
            region=query.get("region", [environment.get("AWS_REGION") or "us-east-1"])[0],
        )

    @property
    def url(self) -> str:
        query = {"endpoint": self.endpoint} if self.endpoint else {}
        if self.region != "us-east-1":
            query["region"] = self.region
        path = f"/{self.prefix}" if self.prefix else ""
        return f"s3://{self.bucket}{path}" + (f"?{urlencode(query, safe=':/')}" if query else "")


def open_s3(url: str) -> ObjectStore:
    """The store at `url`. Nothing is sent yet."""
    location = S3Location.parse(url)
    provider = credentials_provider()

    def credentials() -> Any:
        found = _retrieve(provider)
        expires = found.expiration
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.session_token,
            "expires_at": None
            if expires is None
            else (expires if expires.tzinfo else expires.replace(tzinfo=UTC)),
        }

    credentials()  # now, where the error can say what to do

    def client(max_retries: int) -> Any:
        options: dict[str, Any] = {"endpoint": location.endpoint} if location.endpoint else {}
        return _ObstoreS3(
            location.bucket,
            prefix=location.prefix or None,
            region=location.region,
            virtual_hosted_style_request=location.endpoint is None,
            credential_provider=credentials,
            client_options={"allow_http": True, "timeout": "60s", "connect_timeout": "5s"},
            retry_config={"max_retries": max_retries, "retry_timeout": timedelta(seconds=60)},
            **options,
        )

    return ObstoreStore(location.url, client(4), client(0))


def credentials_provider() -> Provider:
    return ChainedProvider(
        [EnvAWSProvider(), EnvMinioProvider(), AWSConfigProvider(), IamAwsProvider()]
    )


def _retrieve(provider: Provider) -> Any:
    try:
        return provider.retrieve()
    except (ValueError, OSError, MinioException, urllib3.exceptions.HTTPError) as error:
        raise InvalidInput(f"no credentials for s3://: {_CREDENTIALS_HELP} ({error})") from error

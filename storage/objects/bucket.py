"""The bucket under an `s3://` store: what the data path has no words for. The minio SDK makes and
checks it."""

from __future__ import annotations

import logging
from datetime import timedelta
from urllib.parse import urlparse

import urllib3
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import MinioException, S3Error
from minio.lifecycleconfig import AbortIncompleteMultipartUpload, LifecycleConfig, Rule

from populace.storage.errors import InvalidInput, StoreUnavailable, UnsafeStore
from populace.storage.objects.s3 import (
    ABORT_UPLOADS_AFTER_DAYS,
    AWS,
    SUSPENDED,
    S3Location,
    credentials_provider,
)

logger = logging.getLogger(__name__)


class Bucket:
    """The bucket under an `s3://` store: what the data path has no words for."""

    def __init__(self, url: str) -> None:
        self.location = S3Location.parse(url)
        endpoint = urlparse(self.location.endpoint or AWS)
        self._client = Minio(
            endpoint.netloc,
            secure=endpoint.scheme == "https",
            region=self.location.region,
            credentials=credentials_provider(),
            http_client=urllib3.PoolManager(
                timeout=urllib3.Timeout(10), retries=urllib3.Retry(2, backoff_factor=0.2)
            ),
        )

    def ensure(self) -> None:
        """Make the bucket if there is none, and let the server drop uploads that were never
        finished."""
        name = self.location.bucket
        try:
            if not self._client.bucket_exists(name):
                self._client.make_bucket(name)
            self._abort_unfinished_uploads()
        except S3Error as error:
            raise InvalidInput(
                f"bucket {name!r} can't be made or opened: {error.code}: {error.message}"
            ) from error
        except (MinioException, urllib3.exceptions.HTTPError) as error:
            raise StoreUnavailable(
                f"{self.location.endpoint or AWS} does not answer: {error}"
            ) from error

    def check(self) -> None:
        """Raises `UnsafeStore` when what is deleted would stay: then erasure would not erase."""
        name = self.location.bucket
        try:
            versioning = self._client.get_bucket_versioning(name).status
        except S3Error as error:
            raise InvalidInput(
                f"bucket {name!r} can't be opened: {error.code}: {error.message}"
            ) from error
        except (MinioException, urllib3.exceptions.HTTPError) as error:
            raise StoreUnavailable(
                f"{self.location.endpoint or AWS} does not answer: {error}"
            ) from error
        if versioning in (
            ENABLED,
            SUSPENDED,
        ):  # suspended: what was there before keeps its versions
            raise UnsafeStore(
                f"versioning: bucket {name!r} keeps old versions of what is deleted, so a "
                "forgotten user would stay; "
                "use a bucket without versioning"
            )
        if self._has_object_lock():
            raise UnsafeStore(
                f"object lock: bucket {name!r} refuses deletes, so a forgotten user would stay; "
                "use a bucket without "
                "object lock"
            )

    def presigned_link(self, key: str, valid_for: timedelta) -> str:
        """A link with which anybody can download the object `key` until it expires."""
        prefix = f"{self.location.prefix}/" if self.location.prefix else ""
        return self._client.presigned_get_object(
            self.location.bucket, prefix + key, expires=valid_for
        )

    def _has_object_lock(self) -> bool:
        try:
            self._client.get_object_lock_config(self.location.bucket)
        except S3Error:  # "not found" and "not implemented" both mean that there is none
            return False
        return True

    def _abort_unfinished_uploads(self) -> None:
        name = self.location.bucket
        ours = Rule(
            ENABLED,
            rule_filter=Filter(prefix=""),
            rule_id="populace-abort-unfinished-uploads",
            abort_incomplete_multipart_upload=AbortIncompleteMultipartUpload(
                ABORT_UPLOADS_AFTER_DAYS
            ),
        )
        try:
            there = self._client.get_bucket_lifecycle(name)
            rules = [] if there is None else list(there.rules)
            if not any(rule.abort_incomplete_multipart_upload for rule in rules):
                self._client.set_bucket_lifecycle(name, LifecycleConfig([*rules, ours]))
        except (MinioException, ValueError) as error:
            logger.warning(
                "%s: no rule for unfinished uploads (%s); they stay until removed by hand",
                name,
                error,
            )

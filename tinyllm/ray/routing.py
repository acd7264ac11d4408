"""Ray Serve's router of requests, which sends equal beginnings to one replica."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .prefixes import ranked


class PrefixRouter(RequestRouter):  # type: ignore[misc, unused-ignore]  # Any where Ray is missing
    """Prefers the replica that a request's first argument, a digest of its beginning, ranks first.

    A replica that has as many requests as it may have is passed over.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[Any]]:
        """The candidates by rank; all in one rank for a request without a beginning."""
        prefix = pending_request.args[0] if pending_request and pending_request.args else None
        if prefix is None:
            return [candidate_replicas]
        names = [replica.replica_id.unique_id for replica in candidate_replicas]
        return [[candidate_replicas[i]] for i in ranked(prefix, names)]

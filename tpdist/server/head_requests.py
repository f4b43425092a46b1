"""HEAD is answered as GET is (RFC 9110, 9.3.2); the server that sends the answer leaves its body out."""

from starlette.types import ASGIApp, Receive, Scope, Send


class HeadAsGet:
    """Middleware for endpoints that know GET alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            # A copy: what sends the answer must still know that it is one to HEAD.
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)

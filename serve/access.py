"""Who may come in: those who have the key, as a Bearer token or by logging in on the page."""

import hmac
import secrets
from ipaddress import ip_address
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, RedirectResponse, Response

from vlm.errors import ConfigError

LEAST_KEY = 8
OPEN_PATHS = frozenset({"/health"})
LOGIN_PATH = "/login"
MAX_LOGIN_BYTES = 4096

_LOGIN = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vlm: log in</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 1rem system-ui, sans-serif; display: grid; place-items: center; min-height: 90vh;
  color-scheme: light dark; }
form { display: grid; gap: .75rem; width: min(20rem, 90vw); }
input, button { font: inherit; padding: .5rem .75rem; }
</style></head><body><form method="post" action="/login">
<label for="key">The key of this server</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button>%s</form></body></html>"""


class Access:
    """A key, and the session of those who have shown it on the page.

    Args:
        key: at least 8 printable ASCII characters, no space.

    Raises:
        ConfigError: the key is none.
    """

    def __init__(self, key: str) -> None:
        if len(key) < LEAST_KEY or not all("!" <= char <= "~" for char in key):
            raise ConfigError(
                f"the API key must have {LEAST_KEY} printable ASCII characters or more, and no "
                "space; make one with: openssl rand -hex 24"
            )
        self._key = key.encode()
        self._session = secrets.token_urlsafe(32)

    def admits(self, headers: Headers) -> bool:
        """Whether a request has the key, or the cookie of a session."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_key(token.strip()):
            return True
        cookie = cookie_parser(headers.get("cookie", "")).get(_cookie(headers), "")
        return hmac.compare_digest(cookie.encode(), self._session.encode())

    def log_in(self, form: bytes, headers: Headers) -> Response:
        """The reply to the form of the page: a session, or the form again."""
        given = parse_qs(form.decode("utf-8", "replace"), max_num_fields=10).get("key", [""])[0]
        if not self._is_key(given):
            return self.form("<p role='alert'>That is not the key.</p>")
        response = RedirectResponse("/", 303)
        response.set_cookie(_cookie(headers), self._session, httponly=True, samesite="strict")
        return response

    def form(self, note: str = "") -> Response:
        """The page on which to log in."""
        return HTMLResponse(_LOGIN % note, 401)

    def _is_key(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._key)


def access_for(host: str, key: str | None, *, no_auth: bool) -> Access | None:
    """Who may come in to a server at an address to listen on; None lets everybody in.

    Args:
        host: the address.
        key: of the server, if one was given.
        no_auth: whether everybody who can reach the address is wanted.

    Raises:
        ConfigError: the network could come in and nobody said that it should, or the key is
            none.
    """
    if key is not None:
        if no_auth:
            raise ConfigError("--no-auth and an API key exclude each other; choose one")
        return Access(key)
    if not no_auth and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets the network in; set a key in VLM_API_KEY or by --api-key, or "
            "say --no-auth if everybody may use this server"
        )
    return None


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _cookie(headers: Headers) -> str:
    """Cookies are shared between the ports of a machine, so the port is in the name."""
    return f"vlm_session_{''.join(filter(str.isdigit, headers.get('host', '').rpartition(':')[2]))}"

"""The page's door: a key typed in becomes a cookie that scripts cannot read and other sites cannot send."""

from __future__ import annotations

from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse

from pairloop.web.access import KEY_COOKIE
from pairloop.web.context import Here
from pairloop.web.errors import error_response
from pairloop.web.pages.rendering import render

router = APIRouter(include_in_schema=False)

COOKIE_MAX_AGE_S = 14 * 24 * 3600
LONGEST_FORM = 4_096


@router.get("/login")
async def form() -> Response:
    return render("login.html", sends_forms=True, problem=None)


@router.post("/login")
async def log_in(request: Request, context: Here) -> Response:
    """The key itself is the cookie: it stops working when the key does."""
    form = b""
    async for chunk in request.stream():
        form += chunk
        if len(form) > LONGEST_FORM:
            return error_response(413, f"The form of /login has at most {LONGEST_FORM} bytes.")
    token = parse_qs(form.decode(errors="replace")).get("key", [""])[0].strip()
    key = await context.keys.verify(token)
    if isinstance(key, str):
        return render("login.html", sends_forms=True, status_code=401, problem=f"This key {key}.")
    response = RedirectResponse("/", status_code=303)
    secure = request.url.scheme == "https"
    response.set_cookie(KEY_COOKIE, token, max_age=COOKIE_MAX_AGE_S, httponly=True, secure=secure, samesite="strict")
    return response

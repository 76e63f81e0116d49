"""Base and expert side by side: two endpoints, a page in the browser, and two columns in a terminal."""

from __future__ import annotations

from expertprune.serving.chat.endpoints import ChatSettings, Ended, Endpoint, connect
from expertprune.serving.chat.page import Page
from expertprune.serving.chat.sides import Side, running, started

__all__ = ["ChatSettings", "Ended", "Endpoint", "Page", "Side", "connect", "running", "started"]

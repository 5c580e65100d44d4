"""A page as a browser without a network sees it, as JSON: ``python browser.py PAGE SCREENSHOT``.

Run as a process of its own: the engine wants the main thread, and settings from before it is imported.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

WIDTH, HEIGHT = 1100, 2400
SETTLE_MS = 1000
LOOK = """
(() => ({
  title: document.title,
  headings: [...document.querySelectorAll("h2")].map(e => e.innerText),
  drawings: [...document.querySelectorAll("svg[role=img]")].map(e => {
    const box = e.getBoundingClientRect(); return [box.width, box.height]; }),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
}))()
"""


def main(page: str, screenshot: str) -> None:
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    seen: dict[str, Any] = {"requests": [], "messages": []}

    class Interceptor(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info: Any) -> None:
            seen["requests"].append(info.requestUrl().scheme())

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: Any, line: Any, source: Any) -> None:
            seen["messages"].append(message)

    application, view, interceptor = QApplication(sys.argv), QWebEngineView(), Interceptor()
    shown = Page(view)
    shown.profile().setUrlRequestInterceptor(interceptor)
    view.setPage(shown)
    view.resize(WIDTH, HEIGHT)

    def look() -> None:
        view.grab().save(screenshot)
        shown.runJavaScript(LOOK, finish)

    def finish(found: Any) -> None:
        seen["page"] = found
        application.quit()

    def loaded(done: bool) -> None:
        seen["loaded"] = done
        QTimer.singleShot(SETTLE_MS, look)

    view.loadFinished.connect(loaded)
    view.load(QUrl.fromLocalFile(page))
    view.show()
    application.exec()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])

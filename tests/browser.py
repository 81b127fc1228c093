"""A headless Chromium of this machine, spoken to through a pipe in the DevTools protocol. It reaches no network."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One process with one page. `seen` holds what the page asked for and complained of since `open`."""

    def __init__(self, profile: Path):
        ours, theirs = os.pipe(), os.pipe()  # theirs: what it reads; ours: what we read
        command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   "--remote-debugging-pipe", "--no-first-run", "--disable-extensions", "--disable-background-networking",
                   "--disable-component-update", "--proxy-server=127.0.0.1:9", f"--user-data-dir={profile}", "about:blank"]
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs[0], ours[1])]  # out of the way of 3 and 4: its own
        self.process = subprocess.Popen(command, preexec_fn=lambda: [os.dup2(end, i) for i, end in enumerate(ends, 3)],
                                        pass_fds=(3, 4), start_new_session=True, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (*ends, theirs[0], ours[1]):
            os.close(end)
        self.write, self.read, self.left, self.number, self.seen, self.session = theirs[1], ours[0], b"", 0, [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params) -> dict:
        """The answer to a command; events on the way to it go to `seen`."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self.number:
                assert "error" not in said, f"{method}: {said['error']}"
                return said["result"]
            self.seen.append(said)

    def _next(self, seconds: float = 120) -> dict:
        until = time.monotonic() + seconds
        while b"\0" not in self.left:
            assert select.select([self.read], [], [], max(0, until - time.monotonic()))[0], "the browser does not answer"
            part = os.read(self.read, 1 << 16)
            assert part, "the browser has ended"
            self.left += part
        line, _, self.left = self.left.partition(b"\0")
        return json.loads(line)

    def open(self, path: Path, width: int, height: int, dark: bool = False, mobile: bool = False):
        """Shows a file in a window of that size, and waits until it has been drawn."""
        self.seen = []
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.seen):
            self.seen.append(self._next())
        self.drawn()

    def drawn(self):
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def js(self, expression: str):
        """The value of an expression in the page; promises are waited for."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more):
        """kind: Pressed, Moved, Released."""
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def requests(self) -> list[str]:
        """URLs that the page asked for since `open`."""
        return [event["params"]["request"]["url"] for event in self.seen
                if event.get("method") == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Errors and warnings of its console, exceptions, and what its policy has blocked."""
        return [json.dumps(event["params"])[:500] for event in self.seen
                if event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")]

    def screenshot(self, path: Path, whole: bool = False):
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self):
        os.close(self.write)
        os.close(self.read)
        try:
            self.process.wait(5)  # the end of its pipe is its end
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()

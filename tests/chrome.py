"""Headless Chromium driven through a pipe (DevTools protocol), with the network shut."""

import base64
import contextlib
import fcntl
import json
import os
import select
import subprocess
import time

FLAGS = (
    "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-first-run",
)  # fmt: skip
TROUBLE = ("error", "warning", "assert")


class Chrome:
    """A page; `problems` lists what its console complained of and what it asked the network for."""

    def __init__(self, program, profile, *more):
        theirs, ours = os.pipe()
        answers, said = os.pipe()
        theirs, said = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs, said))  # clear of 3 and 4

        def wire():  # the program reads from 3 and writes to 4
            os.dup2(theirs, 3)
            os.dup2(said, 4)

        self._write, self._read, self._rest, self._count, self._session = ours, answers, b"", 0, None
        for end in (ours, answers):
            os.set_inheritable(end, False)
        self._events = []
        self._process = subprocess.Popen(
            [program, *FLAGS, *more, f"--user-data-dir={profile}", "about:blank"], close_fds=False, preexec_fn=wire,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(said)
        pages = [t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self.ask("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while True:
            while b"\0" not in self._rest:
                if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                    raise TimeoutError(method)
                self._rest += os.read(self._read, 1 << 20)
            raw, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(raw)
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._events.append(answer)

    def run(self, code):
        found = self.ask(
            "Runtime.evaluate", expression=f"(async () => {{{code}}})()", awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def show(self, url, *, width=1440, dark=False):
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[feature])
        self.ask("Page.navigate", url=url)
        end = time.monotonic() + 30
        while self.run("return document.readyState + location.href") != f"complete{url}":
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.05)

    def picture(self):
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])

    def problems(self):
        found = []
        for event in self._events:
            about = event.get("params", {})
            match event.get("method"):
                case "Runtime.consoleAPICalled" if about["type"] in TROUBLE:
                    found.append(str(about["args"]))
                case "Runtime.exceptionThrown":
                    found.append(str(about["exceptionDetails"]))
                case "Log.entryAdded" if about["entry"]["level"] in TROUBLE:
                    found.append(about["entry"]["text"])
                case "Network.requestWillBeSent" if not about["request"]["url"].startswith(("file:", "data:")):
                    found.append(about["request"]["url"])
        return found

    def close(self):
        with contextlib.suppress(TimeoutError, OSError):
            self.ask("Browser.close")
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)

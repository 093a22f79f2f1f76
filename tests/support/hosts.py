"""Several machines on this one, for what only separate machines show: `ray up`, Ray Client, loss.

Each host has its own network, process, mount and host name namespaces: an address of its own, a
home, /tmp, /run and /dev/shm of its own, and an sshd as its first process. `ray stop` in a host
can't see the rest of the machine, and SIGKILL of the first process is the loss of the host. All
the rest is this machine's, read-only: hosts share no folder in which they could write.

Nothing gets a name or an address on the machine itself: the bridge between the hosts lies in a
namespace too. Every first process is killed by the kernel when this process ends, however it ends,
and processes, addresses and mounts go with their namespaces.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from support.bundled import ROOT

HOME = pwd.getpwuid(0).pw_dir
PREFIX = "10.77.0"
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "sshd", "rsync")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PRIVATE = {"/tmp": "size=8g,mode=1777", HOME: "size=8g,mode=700", "/dev/shm": "mode=1777"}
SHARED = sorted(  # what runs in the hosts, in the order in which it is mounted
    {ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent.parent}
)
START_LIMIT = 30.0
CHECKOUT = ("saeray", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")


class HostError(AssertionError):
    """A command failed in a host, or a host did not come up. Says what it printed."""


def missing() -> str | None:
    """What this machine lacks for having hosts, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts need Linux and root"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=SYSTEM_PATH) is None]
    if absent:
        return f"hosts need {', '.join(absent)} (openssh-server, rsync, iproute2, util-linux)"
    probe = "ip link add probe type bridge && mount -t tmpfs tmpfs /run"
    tried = subprocess.run(
        ["unshare", "-n", "-m", "-p", "-u", "--fork", "--mount-proc", "sh", "-c", probe],
        capture_output=True,
        text=True,
        timeout=START_LIMIT,
    )
    return f"hosts need namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """One of the machines that `hosts()` makes."""

    def __init__(
        self, name: str, ip: str, process: subprocess.Popen, pid: int, switch: int
    ) -> None:
        self.name, self.ip = name, ip
        self.process = process  # unshare, which ends with the host
        self.switch = switch  # pid of a process in the network of the bridge
        self.pid = pid  # of the host's first process, as this machine numbers it
        self.namespace = os.readlink(f"/proc/{pid}/ns/pid")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def path(self, path: str) -> Path:
        """A file of the host, to be read or written from here; `~` is its home."""
        return Path(f"/proc/{self.pid}/root") / path.replace("~", HOME, 1).lstrip("/")

    def checkout(self, to: str) -> None:
        """Gives the host a copy of this project, which it can change."""
        self.path(to).mkdir(parents=True, exist_ok=True)
        for name in CHECKOUT:
            source, target = ROOT / name, self.path(to) / name
            if source.is_dir():
                skipped = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, target, ignore=skipped, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)

    def _command(self, command: str, env: dict[str, Any] | None, prefix: str) -> list[str]:
        clean = {
            "HOME": HOME,
            "USER": "root",
            "PATH": f"{sys.prefix}/bin:{SYSTEM_PATH}",
            "LANG": "C.UTF-8",
        } | {key: str(value) for key, value in (env or {}).items()}
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-n", "-r", "-w"]
        variables = [f"{key}={value}" for key, value in clean.items()]
        return [*enter, "env", "-i", *variables, *prefix.split(), "bash", "-c", f"cd; {command}"]

    def run(
        self,
        command: str,
        *,
        env: dict[str, Any] | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a bash command in the host's home; `stdout` of what comes back is all it said.

        The environment is a bare one, not that of the tests, with the virtual environment on PATH.
        When the time is over, the command and its process group are killed.
        """
        inside = f"timeout --kill-after=5 {timeout}"
        try:
            done = subprocess.run(
                self._command(command, env, inside),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout + 15,
            )
        except subprocess.TimeoutExpired as late:
            said = (late.stdout or b"").decode(errors="replace")
            raise HostError(f"{self.name}: `{command}` hangs.\n{said}") from None
        if check and done.returncode:
            late = f" (after {timeout} s)" if done.returncode in (124, 137) else ""
            raise HostError(
                f"{self.name}: `{command}` ended with {done.returncode}{late}.\n{done.stdout}"
            )
        return done

    def popen(
        self, command: str, *, env: dict[str, Any] | None = None, **options: Any
    ) -> subprocess.Popen:
        """Starts a bash command in the host; it ends by `end()`, or with the host.

        `options` are those of Popen. Where nothing else is said, its output goes to the test's.
        """
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(self._command(command, env, ""), **options)

    def end(self, started: subprocess.Popen, sent: int = signal.SIGKILL) -> None:
        """Signals what `popen()` started, with all its descendants, and waits for the end."""
        for pid in descendants(started.pid):
            try:
                os.kill(pid, sent)
            except ProcessLookupError:
                pass
        started.wait(timeout=START_LIMIT)

    def processes(self) -> dict[int, str]:
        """Command lines of all of the host's processes but the first, by this machine's pid."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "ns" / "pid") != self.namespace:
                    continue
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # it has ended
                continue
            if line and int(entry.name) != self.pid:
                found[int(entry.name)] = line
        return found

    def ray_processes(self) -> dict[int, str]:
        """Those that have a file of the Ray package mapped: servers, workers, drivers."""
        found = {}
        for pid, line in self.processes().items():
            try:
                mapped = Path(f"/proc/{pid}/maps").read_text()
            except OSError:
                continue
            if re.search(r"-packages/ray/", mapped):
                found[pid] = line
        return found

    def kill(self) -> None:
        """The loss of the machine: its cable is cut, then its first process killed, and so all.

        Cut first, as a kernel that outlives its processes would tell the others that they ended.
        """
        if self.alive:
            inside(self.switch, f"ip link delete {port(self.ip)}")
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait(timeout=START_LIMIT)


@contextmanager
def hosts(*names: str, shm: str = "1500m") -> Iterator[dict[str, Host]]:
    """Hosts by name, up to 250. The first one holds the SSH key that opens them all.

    Args:
        shm: size of each one's /dev/shm; it bounds Ray's object store.
    """
    keys = make_keys()
    addresses = {name: f"{PREFIX}.{number}" for number, name in enumerate(names, start=1)}
    with ExitStack() as stack:
        switch = stack.enter_context(switch_between())
        made = {}
        for name, ip in addresses.items():
            private = PRIVATE | {"/dev/shm": f"size={shm},mode=1777"}
            script = first_process(name, addresses, keys, name == names[0], private)
            made[name] = stack.enter_context(host(name, ip, script, switch))
        for each in made.values():
            wait_for(lambda each=each: listens(each.pid, 22), f"sshd of {each.name}")
        yield made


@contextmanager
def host(name: str, ip: str, script: str, switch: int) -> Iterator[Host]:
    flags = ["-n", "-m", "-p", "-u", "--fork", "--kill-child", "--mount-proc"]
    with tempfile.TemporaryFile("w+") as said, started(["unshare", *flags, "sh"], said) as process:

        def first() -> int | None:
            if process.poll() is not None:
                said.seek(0)
                raise HostError(f"host {name} did not start: {said.read()}")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            return int(children) if children else None

        pid = wait_for(first, f"host {name}")
        assert process.stdin is not None
        process.stdin.write(script)
        process.stdin.close()
        inside(switch, f"ip link add {port(ip)} type veth peer name eth0 netns {pid}")
        inside(switch, f"ip link set {port(ip)} master bridge0 up")
        inside(pid, f"ip address add {ip}/24 dev eth0 && ip link set lo up && ip link set eth0 up")
        inside(pid, f"ip route add default via {PREFIX}.254")
        wait_for(lambda: first() and Path(f"/proc/{pid}/comm").read_text() == "sshd\n", name)
        made = Host(name, ip, process, pid, switch)
        try:
            yield made
        finally:
            made.kill()


def first_process(
    name: str,
    addresses: dict[str, str],
    keys: tuple[str, str],
    holds_key: bool,
    private: dict[str, str],
) -> str:
    """The shell script that makes a host of new namespaces and becomes its sshd."""
    lines = ["set -e", "mount -t tmpfs -o mode=755 tmpfs /run"]
    for shared in SHARED:
        if not any(shared.is_relative_to(folder) for folder in private):
            lines += read_only(shared, shared)
    for folder, options in private.items():
        lines += ["mkdir -p /run/new", f"mount -t tmpfs -o {options} tmpfs /run/new"]
        for shared in SHARED:
            if shared.is_relative_to(folder):
                lines += read_only(shared, Path("/run/new") / shared.relative_to(folder))
        lines.append(f"mount --move /run/new {shlex.quote(folder)}")
    lines.append("mount -o remount,bind,ro /")
    table = "".join(f"{ip} {other}\n" for other, ip in addresses.items())
    files = {
        "/run/hosts": f"127.0.0.1 localhost\n{table}",
        "/run/resolv.conf": "",
        "/run/host_key": keys[0],
        f"{HOME}/.ssh/authorized_keys": keys[1],
    }
    if holds_key:
        files[f"{HOME}/.ssh/id_ed25519"] = keys[0]
    lines += ["umask 077", f"mkdir -p /run/sshd {HOME}/.ssh"]
    for path, text in files.items():
        lines.append(f"printf %s {shlex.quote(text)} > {path}")
    lines += [
        "chmod 644 /run/hosts /run/resolv.conf",
        "mount --bind /run/hosts /etc/hosts",
        "mount --bind /run/resolv.conf /etc/resolv.conf",
        "umask 022",
        f"hostname {name}",
        "cd",
        # nothing of the tests' environment gets in; sshd wants to be called by its whole path
        f"exec env -i HOME={HOME} PATH={SYSTEM_PATH} {shutil.which('sshd', path=SYSTEM_PATH)} -D -e"
        " -f /dev/null -h /run/host_key -o MaxStartups=100 -o MaxSessions=100 < /dev/null",
    ]
    return "\n".join(lines) + "\n"


def read_only(source: Path, target: Path) -> list[str]:
    here, there = shlex.quote(str(source)), shlex.quote(str(target))
    return [
        f"mkdir -p {there}",
        f"mount --bind {here} {there}",
        f"mount -o remount,bind,ro {there}",
    ]


@contextmanager
def switch_between() -> Iterator[int]:
    """The pid of a process in whose network namespace the bridge is."""
    with started(["unshare", "-n", "sleep", "infinity"]) as process:

        def apart() -> bool:
            assert process.poll() is None, "no network namespace"
            names = [os.readlink(f"/proc/{pid}/ns/net") for pid in ("self", process.pid)]
            return names[0] != names[1]

        wait_for(apart, "the switch")
        inside(process.pid, "ip link add bridge0 type bridge && ip link set bridge0 up")
        inside(process.pid, f"ip address add {PREFIX}.254/24 dev bridge0")
        # what lies outside is answered at once as unreachable, not left to time out
        inside(process.pid, "echo 1 > /proc/sys/net/ipv4/ip_forward")
        yield process.pid


def port(ip: str) -> str:
    """The switch's end of the cable to a host."""
    return f"port{ip.rpartition('.')[2]}"


def inside(pid: int, command: str) -> None:
    """Runs a command of this machine in the network namespace of a process."""
    done = subprocess.run(
        ["nsenter", "-t", str(pid), "-n", "sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=START_LIMIT,
    )
    if done.returncode:
        raise HostError(f"{command}: {done.stderr}")


@contextmanager
def started(command: list[str], said: IO[str] | None = None) -> Iterator[subprocess.Popen]:
    """A process that ends with the block or, whatever happens, with this process."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if said is None else said,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=START_LIMIT)


def make_keys() -> tuple[str, str]:
    """A private and a public SSH key."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "key"
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(file)]
        subprocess.run(command, check=True, timeout=START_LIMIT)
        return file.read_text(), file.with_suffix(".pub").read_text()


def listens(pid: int, port: int) -> bool:
    """Whether somebody listens at a TCP port in the network of a process."""
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    sockets = [line.split()[:4] for line in lines]
    return any(mine.endswith(f":{port:04X}") and state == "0A" for _, mine, _, state in sockets)


def descendants(pid: int) -> list[int]:
    """Pids of a process's children and of theirs, itself not among them."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def wait_for(condition: Any, what: str, limit: float = START_LIMIT) -> Any:
    """The first value of `condition()` that is true."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise HostError(f"{what}: waited {limit:.0f} s in vain")
        time.sleep(0.05)
    return value

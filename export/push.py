"""Publishing to the Hugging Face Hub: one commit, all of it or nothing.

Why not `upload_folder`: it makes several commits, so that a reader may find half a model. Why operations are built anew
for each try: a commit whose answer was lost has landed, and the same files then make no second one.
"""
import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Type, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id
from huggingface_hub.utils.sha import git_hash

from export.metadata import find_difference
from timm_tmblock.errors import InputError

T = TypeVar('T')
TRIES = 5
WAITS = (1., 2., 4., 8.)  # seconds between them
SIGN_IN = 60.  # seconds
WEIGHTS, ONNX, CARD = 'model.safetensors', 'onnx/model.onnx', 'README.md'
PICKLED = 'pytorch_model.bin'  # the same weights as timm writes them, too
OUR_ONNX = re.compile(r'(onnx/model(?:_\w+)?\.onnx)(?:\.json)?')
ENGINE_SOURCE = re.compile(r'engines/[^/]+/[^/]+-[0-9a-f]{8}\.onnx(?:\.json)?')  # of export/publish.py
PULL_REQUEST = re.compile(r'refs/pr/\d+')
NO_REF = re.compile(  # by git check-ref-format
    r'[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^@$|^[-/]|(?:^|/)\.|[./]$|\.lock(?:/|$)')
EXPORTS = ('onnx/', 'engines/')  # folders on the Hub
# the bases of HfHubHTTPError for HTTP and connections, whatever the client uses; RuntimeError for uploads, ValueError
# for what the Hub refuses
FAILURES: Tuple[Type[BaseException], ...] = (*HfHubHTTPError.__bases__, RuntimeError, ValueError)


class PushError(RuntimeError):
    """The Hub or the network failed; the message is one sentence, and trying again later may do."""


class DeadlineError(PushError):
    """The Hub did not finish in time. Threads of the client may still wait for it: leave by `leave_hanging`."""


@dataclass(frozen=True)
class Published:
    """What a repository has that a push goes on from; nothing where there is none."""
    engines: Mapping[str, Dict[str, Any]] = field(default_factory=dict)  # sidecars by the engine's path
    card: Optional[str] = None
    weights: Optional[str] = None  # sha256 of the file


@dataclass(frozen=True)
class PushOptions:
    """Where to, and how."""
    repo: str
    private: bool = False
    revision: Optional[str] = None
    tag: Optional[str] = None
    message: str = 'Upload model, exports and card'
    create_pr: bool = False
    deadline: float = 1800.  # seconds for all of it

    @property
    def pull_request(self) -> Optional[str]:
        """The revision, if it is that of a pull request."""
        return self.revision if self.revision and PULL_REQUEST.fullmatch(self.revision) else None

    def validate(self) -> None:
        """
        Raises:
            InputError: For options that no push can have.
        """
        try:
            validate_repo_id(self.repo)
        except ValueError as e:
            raise InputError(f'{self.repo!r} is not a repository name: {str(e).splitlines()[0]}') from e
        if '/' not in self.repo:
            raise InputError(f'{self.repo!r} is not a repository name: its owner comes first, USER/{self.repo}.')
        if not 0 < self.deadline <= threading.TIMEOUT_MAX:
            raise InputError(
                f'--deadline must be above 0 and at most {threading.TIMEOUT_MAX:g} seconds, not {self.deadline:g}.')
        if not self.message.strip():
            raise InputError('--message must not be empty; describe the upload.')
        if self.tag and (self.create_pr or self.pull_request):
            raise InputError(
                '--tag names a commit of the repository, which a pull request is not yet; leave one out.')
        for flag, name in (('--tag', self.tag), ('--revision', self.revision)):
            if name and NO_REF.search(name):
                raise InputError(f'{flag} {name!r} is no name that git takes; use letters, digits, dots and dashes.')
        if self.revision and self.create_pr:
            raise InputError('--revision names a branch to push to, and a pull request has its own; leave one out.')


def push(folder: Path, files: Sequence[Path], options: PushOptions, say: Callable[[str], None] = print) -> str:
    """Publish files as one commit and verify what arrived.

    Args:
        folder: Folder the files are in.
        files: Files relative to it, which is what they are called on the Hub.
        options: Where to.
        say: Told what happens.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        InputError: For a token, a name or rights that will not do. Nothing was uploaded, unless it says so of the tag.
        DeadlineError: If the deadline passed.
        PushError: If the Hub or the network failed. Nothing is half-published.
    """
    os.environ.setdefault('HF_XET_CLIENT_RETRY_MAX_DURATION', '30s')  # Xet's own tries; there are TRIES around them
    return _within(
        options.deadline, _Push(options, options.deadline, folder, files, say).run,
        '; the repository has all of the commit or nothing, so run the same command again')


def _within(seconds: float, call: Callable[[], T], otherwise: str = '') -> T:
    """The result of a call, in a thread, as the client's own tries know no deadline.

    Args:
        seconds: Deadline.
        call: Asks the Hub.
        otherwise: What to say where it is not there in time.

    Raises:
        DeadlineError: Of that.
    """
    result: Dict[str, Any] = {}

    def work() -> None:
        try:
            result['value'] = call()
        except BaseException as e:
            result['error'] = e

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    global _hanging
    try:
        thread.join(seconds)
    finally:  # interrupted, too
        _hanging = thread.is_alive()
    if _hanging:
        raise DeadlineError(f'The Hub did not finish within {seconds:g} s{otherwise}.')
    if 'error' in result:
        raise result['error']
    return result['value']


_hanging = False  # whether a call was given up


def leave_hanging(code: int) -> None:
    """End the process here if a call was given up: Python would wait for the threads of the client's uploads."""
    if _hanging:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def check_access(options: PushOptions) -> None:
    """Ask before work that would be for nothing whether a push can succeed.

    Raises:
        InputError: If there is no token, the Hub does not accept it, it may only read, the repository is public and the
            push private, or the tag is on another commit.
        PushError: If the Hub or the network failed.
    """
    _within(SIGN_IN, _Push(options, SIGN_IN).check_access)


def get_endpoint() -> str:
    """Address of the Hub."""
    return str(HfApi().endpoint)


def find_weights_hash(options: PushOptions) -> Optional[str]:
    """Hash of the weights that the repository has, None where there are none.

    Raises:
        InputError: If the token may not see it.
        PushError: If the Hub or the network failed.
    """
    return _within(SIGN_IN, lambda: _Push(options, SIGN_IN).find_published()[1].get(WEIGHTS))


def read_published(options: PushOptions) -> Published:
    """What the repository has.

    Raises:
        InputError: If the token may not see it.
        PushError: If the Hub or the network failed.
    """
    return _within(SIGN_IN, _Push(options, SIGN_IN).read_published)


class _Push:
    def __init__(
            self,
            options: PushOptions,
            seconds: float,  # from now on, in which all must be done
            folder: Path = Path(),
            files: Sequence[Path] = (),
            say: Callable[[str], None] = print,
    ) -> None:
        self.options = options
        self.end = time.monotonic() + seconds
        self.folder = folder
        self.files = files
        self.say = say
        self.token = get_token()
        self.api = HfApi(token=self.token)

    def run(self) -> str:
        options = self.options
        options.validate()
        user = self.check_token()
        self._prepare_repository()
        if options.tag:
            self._retry(self._check_tag, 'look for the tag')
        if options.create_pr:
            return self._retry(self._open_pull_request, 'open a pull request')
        before = self._retry(lambda: self._find_head(options.revision), 'look for the repository')
        commit = self._retry(self._commit, 'commit')
        self._verify(commit.oid)
        if options.tag:
            self._retry(lambda: self._tag(commit.oid), 'tag')
        self.say(f'{options.repo} has these files already, at {commit.oid[:8]}' if commit.oid == before else
                 f'{user} pushed {len(self.files)} files to {options.repo} at {commit.oid[:8]}')
        return str(commit.commit_url)

    def check_token(self) -> str:
        if not self.token:
            raise InputError('There is no Hub token here; run "hf auth login" or set HF_TOKEN.')
        user = self._retry(self.api.whoami, 'sign in')
        role = ((user.get('auth') or {}).get('accessToken') or {}).get('role')
        if role == 'read':  # of a fine-grained one, the rights are told by what it tries
            raise InputError('The token may only read; use one with write access.')
        return user['name']

    def check_access(self) -> None:
        self.check_token()
        if self._find_repository() and self.options.tag:
            with contextlib.suppress(_Missing):  # the branch is yet to be
                self._retry(self._check_tag, 'look for the tag')

    def read_published(self) -> Published:
        head, tree = self.find_published()
        found = {}
        for path in tree:
            engine = path.removesuffix('.json')
            if engine != path and engine in tree and re.fullmatch(r'engines/[^/]+/[^/]+\.(engine|plan)', engine):
                file = self._download(path, head)
                with contextlib.suppress(ValueError):  # not one of ours
                    found[engine] = json.loads(file.read_text(encoding='utf-8'))
        card = self._download(CARD, head).read_text(encoding='utf-8-sig', errors='replace') if CARD in tree else None
        return Published(found, card, tree.get(WEIGHTS))

    def find_published(self) -> Tuple[Optional[str], Dict[str, str]]:
        """Commit and tree that the push goes on from; None and no files where there is no repository."""
        for revision in dict.fromkeys((self.options.revision, None)):  # a branch that is yet to be has main's files
            with contextlib.suppress(_Missing):
                head = self._retry(functools.partial(self._find_head, revision), 'look for the repository')
                return head, self._retry(functools.partial(self._list_tree, head), 'list what is there')
        return None, {}

    def _download(self, path: str, revision: Optional[str]) -> Path:
        return Path(self._retry(
            functools.partial(self.api.hf_hub_download, self.options.repo, path, revision=revision), f'read {path}'))

    def _find_repository(self) -> bool:
        """Whether the repository is there.

        Raises:
            InputError: If it is public and the push private, or it or a pull request to go on with is not there.
        """
        options = self.options
        try:
            info = self._retry(lambda: self.api.repo_info(options.repo), 'look for the repository')
        except _Missing:
            if options.create_pr or options.pull_request:
                raise InputError(f'There is no repository {options.repo} for a pull request.') from None
            return False
        if options.pull_request:
            self._retry(lambda: self._find_head(options.pull_request), 'look for the pull request')
        if options.private and not info.private:
            raise InputError(
                f'{options.repo} already exists and is public, so nothing pushed to it is private; make it private '
                f'first, or leave out --private.')
        return True

    def _prepare_repository(self) -> None:
        """Find the repository, or create it; never a public one for a private push."""
        options = self.options
        if not self._find_repository():
            self._retry(
                lambda: self.api.create_repo(options.repo, private=options.private or None, exist_ok=True),
                'create the repository')
            self._find_repository()  # somebody else may have created it meanwhile
        if options.revision and not options.pull_request:
            self._retry(
                lambda: self.api.create_branch(options.repo, branch=str(options.revision), exist_ok=True),
                'create the branch')

    def _check_tag(self) -> None:
        """
        Raises:
            InputError: If the tag is there and this push would make a commit that it does not name.
        """
        options = self.options
        tags = {tag.name: tag.target_commit for tag in self.api.list_repo_refs(options.repo).tags}
        if options.tag in tags:
            head = self._find_head(options.revision)
            tree = self._list_tree(head)
            if tags[options.tag] != head or self._find_different(tree) or self._find_stale(tree, head):
                raise InputError(f'The tag {options.tag} already exists on another commit; choose another.')

    def _find_head(self, revision: Optional[str]) -> str:
        return str(self.api.repo_info(self.options.repo, revision=revision).sha)

    def _list_tree(self, revision: str) -> Dict[str, str]:
        """Hash of each file: sha256 of LFS files, git's of others."""
        return {
            item.path: (item.lfs.sha256 if item.lfs else item.blob_id)
            for item in self.api.list_repo_tree(self.options.repo, recursive=True, revision=revision)
            if isinstance(item, RepoFile)}

    def _find_different(self, tree: Dict[str, str]) -> List[Path]:
        """Files that are not there as they are here."""
        return [file for file, hashes in self._hashes.items() if tree.get(file.as_posix()) not in hashes]

    @functools.cached_property
    def _hashes(self) -> Dict[Path, Tuple[str, str]]:
        """Git's hash and sha256 of each file."""
        found = {}
        for file in self.files:
            content = (self.folder / file).read_bytes()
            found[file] = git_hash(content), hashlib.sha256(content).hexdigest()
        return found

    def _find_stale(self, tree: Dict[str, str], revision: str) -> List[str]:
        """Files to delete, of an earlier push.

        If it was of another network, all exports that are not pushed now, and with other weights those that timm
        pickled. If of the same, our ONNX files that are left out now; engines, which may be of another machine, stay
        with their sources, and so do files of other people.
        """
        kept = {file.as_posix() for file in self.files}
        exports = [path for path in tree if path.startswith(EXPORTS) and path not in kept]
        has_others = WEIGHTS in tree and Path(WEIGHTS) in self._find_different(tree)
        pickled = [path for path in (PICKLED,) if path in tree and path not in kept and has_others]
        if not exports or self._is_of_another_network(tree, revision):
            return exports + pickled
        if f'{ONNX}.json' not in kept:
            return []
        ours = {path: OUR_ONNX.fullmatch(path) for path in exports}
        left = [path for path, match in ours.items() if match and f'{match[1]}.json' in tree]  # with its sidecar
        return left + self._find_sources_left(tree, kept, revision)

    def _find_sources_left(self, tree: Dict[str, str], kept: Set[str], revision: str) -> List[str]:
        """ONNX files beside the engines that are pushed, which no engine there will name as what it was built from."""
        folders = {str(PurePosixPath(path).parent) for path in kept if path.startswith('engines/')}
        beside = [path for path in tree if path not in kept and str(PurePosixPath(path).parent) in folders]
        sources = [path for path in beside if ENGINE_SOURCE.fullmatch(path)]
        if not sources:
            return []
        named = set()
        for path in (path for path in beside if path.endswith('.json') and path not in sources):
            theirs = Path(self.api.hf_hub_download(self.options.repo, path, revision=revision))
            try:
                source = json.loads(theirs.read_text(encoding='utf-8'))['engine']['onnx']
                named.add(str(PurePosixPath(path).parent / source))
            except (ValueError, KeyError, TypeError):  # nothing of ours, which names none
                continue
        return [path for path in sources if path.removesuffix('.json') not in named]

    def _is_of_another_network(self, tree: Dict[str, str], revision: str) -> bool:
        """As sidecars say, which have class names and preprocessing too; without any, by the file of the weights."""
        different = {file.as_posix() for file in self._find_different(tree)}
        compared = False
        for path in (file.as_posix() for file in self.files):
            if path not in tree or not path.startswith(EXPORTS) or not path.endswith('.json'):
                continue
            if path in different:
                theirs = self.api.hf_hub_download(self.options.repo, path, revision=revision)
                try:
                    if find_difference(json.loads((self.folder / path).read_text(encoding='utf-8')), json.loads(
                            Path(theirs).read_text(encoding='utf-8'))):
                        return True
                except (ValueError, AttributeError):  # not one of ours
                    continue
            compared = True
        return not compared and WEIGHTS in tree and WEIGHTS in different

    def _commit(self) -> CommitInfo:
        options = self.options
        head = self._find_head(options.revision)
        stale = self._find_stale(self._list_tree(head), head)
        for path in stale:
            self.say(f'removing {path}, which is of another network or left out now')
        operations: List[Any] = [
            *(CommitOperationAdd(path_in_repo=file.as_posix(), path_or_fileobj=self.folder / file)
              for file in self.files),
            *(CommitOperationDelete(path_in_repo=path) for path in stale)]
        return self.api.create_commit(
            options.repo, operations, commit_message=options.message, revision=options.revision,
            create_pr=options.create_pr, parent_commit=head)

    def _open_pull_request(self) -> str:
        """Address of an open pull request with these files: one that is there, or a new one.

        An answer that was lost leaves one behind, and the Hub would open a second.
        """
        repo = self.options.repo

        def is_done(revision: str) -> bool:
            tree = self._list_tree(revision)
            return not self._find_different(tree) and not self._find_stale(tree, revision)

        if is_done(self._find_head(self.options.revision)):
            self.say(f'{repo} has these files already, so there is nothing to open a pull request for')
            return f'{self.api.endpoint}/{repo}'
        for request in self.api.get_repo_discussions(
                repo, discussion_type='pull_request', discussion_status='open'):
            if is_done(f'refs/pr/{request.num}'):
                return request.url
        commit = self._commit()
        self._verify(str(commit.pr_revision))
        return str(commit.pr_url)

    def _verify(self, revision: str) -> None:
        tree = self._retry(lambda: self._list_tree(revision), 'list what arrived')
        different = self._find_different(tree)
        if different:
            raise PushError(f'{different[0]} on the Hub is not what was pushed; run the same command again.')

    def _tag(self, revision: str) -> None:
        options = self.options
        try:
            self.api.create_tag(options.repo, tag=str(options.tag), revision=revision)
        except HfHubHTTPError as e:  # there since the check: by an earlier try, or by somebody else
            if _status(e) != 409:
                raise
            if self.api.repo_info(options.repo, revision=options.tag).sha != revision:
                raise InputError(
                    f'The files are pushed, but the tag {options.tag} was made by somebody else meanwhile; '
                    f'choose another.') from e

    def _retry(self, call: Callable[[], Any], doing: str) -> Any:
        """The result of a call; what may pass is tried again.

        Raises:
            InputError: For errors that the user can correct.
            PushError: For errors that trying again did not help.
        """
        for attempt in range(TRIES):
            try:
                return call()
            except (InputError, PushError):
                raise
            except (RepositoryNotFoundError, RevisionNotFoundError) as e:
                raise self._refusal(404, doing, e) from e
            except OfflineModeIsEnabled as e:
                raise InputError('HF_HUB_OFFLINE is set, so the Hub cannot be reached; unset it.') from e
            except FAILURES as e:
                if isinstance(e, ValueError) and not isinstance(e, json.JSONDecodeError):
                    raise InputError(f'The Hub refuses it: {self._clean(e)}.') from e
                status = _status(e)
                of_hub = getattr(e, 'response', None) is not None  # Xet's 404 says nothing of the repository
                if status and (status in (401, 403) or (status == 404 and of_hub)):
                    raise self._refusal(status, doing, e) from e
                wait = _wait(e, attempt)
                if attempt == TRIES - 1 or time.monotonic() + wait > self.end or status in (400, 404, 413, 422):
                    raise PushError(f'Could not {doing}: {self._clean(e)}; try again later.') from e
                self.say(f'could not {doing} ({self._clean(e)}), trying again in {wait:g} s')
                time.sleep(wait)
        raise AssertionError

    def _refusal(self, status: int, doing: str, error: BaseException) -> Exception:
        if status == 401:
            return InputError('The Hub does not accept the token; run "hf auth login" with a valid one.')
        if status == 403:  # of rights, or of a quota
            return InputError(
                f'The Hub does not let this token {doing} ({self._clean(error)}); if it lacks write access to '
                f'{self.options.repo}, use one that has it, or --create-pr.')
        if doing == 'sign in':
            return InputError(f'There is no Hub at {self.api.endpoint} to sign in to; correct HF_ENDPOINT.')
        return _Missing(f'{self.options.repo} or its revision is not there, or the token may not see it; check both.')

    def _clean(self, error: BaseException) -> str:
        """One line that says what happened, without the token."""
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = _status(cause)
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        told = ' '.join(lines) if isinstance(cause, ValueError) else lines[0]  # of a card, what is wrong comes last
        reason = getattr(cause, 'server_message', None)  # the text of a 403 goes on after it with advice on tokens
        text = f'HTTP {status}, {" ".join(reason.split()) if reason else lines[-1]}' if status else told
        return (text.replace(self.token, '***') if self.token else text).rstrip('.')[:200]


class _Missing(InputError):
    """There is no such repository or revision."""


def _status(error: BaseException) -> Optional[int]:
    response = getattr(error, 'response', None)
    if response is None:  # of Xet's client the text alone tells
        told = re.search(r'HTTP status .*error \((\d{3}) ', str(error))
        return int(told[1]) if told else None
    return int(response.status_code)


def _wait(error: BaseException, attempt: int) -> float:
    """Seconds before the next try: what the server asks for, or twice as long each time."""
    response = getattr(error, 'response', None)
    headers = {} if response is None else response.headers
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get('Retry-After', '')
    return float(asked) if asked.isdigit() else WAITS[min(attempt, len(WAITS) - 1)]


def list_files(folder: Path, files: Sequence[Path]) -> List[str]:
    """A line for each file with its size, and the total."""
    sizes = [(folder / file).stat().st_size for file in files]
    lines = [f'{size / 1e6:10.3f} MB  {file.as_posix()}' for file, size in zip(files, sizes)]
    return [*lines, f'{sum(sizes) / 1e6:10.3f} MB  in {len(files)} files']

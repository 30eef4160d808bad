"""A stand-in for the Hugging Face Hub on the loopback address: repositories, commits, LFS and Xet, with faults.

Two origins, as the real one has: the Hub wants the token, the storage must never see it. What the client asks for is in
its own sources; nothing here was compared with the real Hub.
"""
import base64
import hashlib
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Optional
from urllib.parse import parse_qs, unquote, urlsplit

from hub_xet import XetStore

WRITE, READ, GUEST = 'hf_write_token', 'hf_read_token', 'hf_guest_token'
USERS = {WRITE: ('me', 'write'), READ: ('me', 'read'), GUEST: ('you', 'write')}


@dataclass
class Fault:
    """What happens to some requests instead of, or after, what should."""
    method: str
    path: str  # regular expression
    times: int = 1
    status: int = 0
    headers: Dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "injected"}'
    cut: bool = False  # close the connection without an answer
    after: bool = False  # once the request has been handled
    delay: float = 0.
    truncate: Optional[int] = None  # close the connection after so many bytes of the answer


@dataclass
class Repository:
    private: bool = False
    commits: List[Dict[str, Any]] = field(default_factory=list)  # oid, message, files: path -> oid, size, lfs, content
    branches: Dict[str, str] = field(default_factory=dict)
    tags: Dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def find(self, revision: str) -> Optional[Dict[str, Any]]:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((c for c in self.commits if c['oid'] == oid), None)

    def add(self, message: str, files: Dict[str, Any]) -> str:
        oid = hashlib.sha1(f'{len(self.commits)} {message} {sorted(files)}'.encode()).hexdigest()
        self.commits.append(dict(oid=oid, message=message, files=files))
        return oid


class Hub:
    """Start one, set HF_ENDPOINT to its `endpoint`, and look at `repositories` afterwards."""

    def __init__(self, xet: Optional[XetStore] = None) -> None:
        self.xet = xet  # without one, uploads by Xet find nobody
        self.part_size = 0  # of LFS uploads in parts
        self.default_visibility = 'public'  # organizations may choose
        self.parts: Dict[str, Dict[int, bytes]] = {}
        self.repositories: Dict[str, Repository] = {}
        self.blobs: Dict[str, bytes] = {}
        self.faults: List[Fault] = []
        self.requests: List[str] = []
        self.leaks: List[str] = []  # requests that took the token to the storage
        self.lock = threading.RLock()
        self.servers = [self._start(HubHandler), self._start(StorageHandler)]
        self.endpoint, self.storage = (f'http://127.0.0.1:{s.server_address[1]}' for s in self.servers)

    def _start(self, handler: Any) -> ThreadingHTTPServer:
        server = _Server(('127.0.0.1', 0), type('Handler', (handler,), dict(hub=self)))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def create(self, name: str, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.branches['main'] = repository.add('initial commit', {})
        return repository

    def has_been_sent(self) -> bool:
        """Whether content was uploaded, or leave to do so was asked for."""
        return bool(self.blobs) or any('xet-write-token' in r for r in self.requests)

    def receive(self, oid: str, size: int) -> bool:
        """Whether the content of this sha256 has arrived."""
        if oid not in self.blobs and self.xet:
            own = self.xet.list_hashes().get(oid)
            if own:
                self.blobs[oid] = self.xet.read(own, size)
        return oid in self.blobs


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # of a client that was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # an answer's body would wait for the client to confirm its headers
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def send(self, status: int, value: Any = None, headers: Optional[Dict[str, str]] = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps({} if value is None else value).encode()
        self.answer = status, body, headers or {}

    def refuse(self, status: int, message: str, code: str = '') -> None:
        headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}
        self.send(status, {'error': message}, headers)

    def handle_any(self) -> None:
        length = int(self.headers.get('Content-Length') or 0)
        if self.headers.get('Transfer-Encoding') == 'chunked':
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            self.body = b''.join(chunks)
        else:
            self.body = self.rfile.read(length) if length else b''
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append(f'{self.command} {path}')
            fault = next((f for f in self.hub.faults if f.times > 0 and f.method == self.command and re.search(
                f.path, self.path)), None)
            if fault:
                fault.times -= 1
        if fault and fault.delay:
            time.sleep(fault.delay)
        self.answer = 404, b'{}', {}
        if not fault or fault.after or not (fault.status or fault.cut):
            with self.hub.lock:
                self.respond(unquote(path), parse_qs(urlsplit(self.path).query))
        if fault and fault.cut:
            self.close_connection = True
            self.connection.close()
            return
        status, body, headers = (fault.status, fault.body, fault.headers) if fault and fault.status else self.answer
        self.send_response(status)
        for key, value in {'Content-Type': 'application/json', **headers, 'Content-Length': str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body if fault is None or fault.truncate is None else body[:fault.truncate])
        if fault and fault.truncate is not None:
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def respond(self, path: str, query: Dict[str, List[str]]) -> None:
        raise AssertionError


class StorageHandler(_Handler):
    def respond(self, path: str, query: Dict[str, List[str]]) -> None:
        if self.headers.get('Authorization'):
            self.hub.leaks.append(self.path)
            return self.refuse(400, 'the storage was sent a token')
        _, kind, oid, *part = path.split('/')
        if kind == 'parts' and self.command == 'PUT':
            self.hub.parts.setdefault(oid, {})[int(part[0])] = self.body
            return self.send(200, headers={'ETag': f'"{hashlib.md5(self.body).hexdigest()}"'})
        if kind == 'parts':
            return self.complete(oid)
        if self.command == 'PUT':
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self.refuse(400, 'other content')
            self.hub.blobs[oid] = self.body
            return self.send(200)
        content = self.hub.blobs.get(oid)
        if content is None:
            return self.refuse(404, 'no blob')
        headers = {'Content-Type': 'application/octet-stream', 'ETag': f'"{oid}"', 'Accept-Ranges': 'bytes'}
        begin = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if not begin:
            return self.send(200, content, headers)
        at = int(begin[1])
        self.send(206, content[at:], {**headers, 'Content-Range': f'bytes {at}-{len(content) - 1}/{len(content)}'})

    def complete(self, oid):
        parts = self.hub.parts.pop(oid, {})
        expected = [{'partNumber': n, 'etag': f'"{hashlib.md5(p).hexdigest()}"'} for n, p in sorted(parts.items())]
        content = b''.join(p for _, p in sorted(parts.items()))
        if json.loads(self.body)['parts'] != expected or hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, 'other parts')
        self.hub.blobs[oid] = content
        self.send(200)


class HubHandler(_Handler):
    def respond(self, path: str, query: Dict[str, List[str]]) -> None:
        self.user = USERS.get(self.headers.get('Authorization', '').removeprefix('Bearer '))
        if self.headers.get('Authorization') and not self.user:
            return self.refuse(401, 'Invalid credentials in Authorization header')
        for pattern, handle in (
                (r'/api/whoami-v2', self.whoami),
                (r'/api/validate-yaml', self.validate),
                (r'/api/repos/create', self.create),
                (r'/api/models/([^/]+/[^/]+)(?:/revision/(.+))?', self.info),
                (r'/api/models/([^/]+/[^/]+)/preupload/(.+)', self.preupload),
                (r'/api/models/([^/]+/[^/]+)/commit/(.+)', self.commit),
                (r'/api/models/([^/]+/[^/]+)/branch/(.+)', self.branch),
                (r'/api/models/([^/]+/[^/]+)/tag/(.+)', self.tag),
                (r'/api/models/([^/]+/[^/]+)/tree/(.+)', self.tree),
                (r'/api/models/([^/]+/[^/]+)/discussions', self.discussions),
                (r'/api/models/([^/]+/[^/]+)/refs', self.refs),
                (r'/api/models/([^/]+/[^/]+)/xet-(write|read)-token/(.+)', self.xet_token),
                (r'/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)', self.resolve_cache),
                (r'/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)', self.lfs),
                (r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', self.resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                return handle(query, *match.groups())
        return self.refuse(404, f'no such endpoint {path}')

    def whoami(self, query):
        if not self.user:
            return self.refuse(401, 'Invalid user token.')
        self.send(200, {'name': self.user[0], 'auth': {'type': 'access_token', 'accessToken': {'role': self.user[1]}}})

    def validate(self, query):
        text = json.loads(self.body)['content']
        if not text.startswith('---\n'):
            return self.send(400, {'errors': [{'message': 'no front matter'}], 'warnings': []})
        if 'widget: no' in text:
            return self.send(400, {'errors': [{'message': '"widget" must be an array'}], 'warnings': []})
        self.send(200, {'errors': [], 'warnings': []})

    def create(self, query):
        request = json.loads(self.body)
        if not self.user or self.user[1] != 'write':
            return self.refuse(403, 'You don\'t have the rights to create a model')
        name = f'{request.get("organization") or self.user[0]}/{request["name"]}'
        url = f'{self.hub.endpoint}/{name}'
        if name in self.hub.repositories:
            return self.send(409, {'error': 'You already created this model repo', 'url': url})
        self.hub.create(name, request.get('visibility', self.hub.default_visibility) == 'private')
        self.send(200, {'url': url})

    def find(self, name):
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.user):
            self.refuse(404 if self.user else 401, 'Repository not found', 'RepoNotFound')
            return None
        return repository

    def find_commit(self, name, revision):
        repository = self.find(name)
        commit = repository.find(revision) if repository else None
        if repository and commit is None:
            self.refuse(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return repository, commit

    def may_write(self, query, name):
        if self.user and self.user[1] == 'write' and (name.startswith(f'{self.user[0]}/') or query.get('create_pr')):
            return True
        self.refuse(403, 'Forbidden: you need write access')
        return False

    def info(self, query, name, revision):
        repository, commit = self.find_commit(name, revision or 'main')
        if commit:
            self.send(200, {
                'id': name, 'modelId': name, 'sha': commit['oid'], 'private': repository.private, 'tags': [],
                'siblings': [{'rfilename': p} for p in commit['files']]})

    def preupload(self, query, name, revision):
        repository, commit = self.find_commit(name, revision)
        if commit is None or not self.may_write(query, name):
            return
        files = []
        for f in json.loads(self.body)['files']:
            binary = b'\0' in base64.b64decode(f['sample']) or f['size'] > 1_000_000
            there = commit['files'].get(f['path'])
            files.append({
                'path': f['path'], 'uploadMode': 'lfs' if binary else 'regular', 'shouldIgnore': False,
                **({'oid': there['oid']} if there else {})})
        self.send(200, {'files': files})

    def lfs(self, query, name, what):
        if self.find(name) is None or not (self.user):
            return
        request = json.loads(self.body)
        if what == 'verify':
            return self.send(200) if request['oid'] in self.hub.blobs else self.refuse(404, 'not uploaded')
        objects = []
        for o in request['objects']:
            count = -(-o['size'] // self.hub.part_size) if self.hub.part_size else 0
            parts = {f'{n:05d}': f'{self.hub.storage}/parts/{o["oid"]}/{n}' for n in range(1, count + 1)}
            upload = {'href': f'{self.hub.storage}/parts/{o["oid"]}', 'header': {
                'chunk_size': str(self.hub.part_size), **parts}}
            if not count:
                upload = {'href': f'{self.hub.storage}/blobs/{o["oid"]}', 'header': {}}
            actions = {} if o['oid'] in self.hub.blobs else {'actions': {
                'upload': upload,
                'verify': {'href': f'{self.hub.endpoint}/{name}.git/info/lfs/objects/verify', 'header': {}}}}
            objects.append({'oid': o['oid'], 'size': o['size'], **actions})
        self.send(200, {'transfer': 'multipart' if self.hub.part_size else 'basic', 'objects': objects})

    def commit(self, query, name, revision):
        repository, head = self.find_commit(name, revision)
        if head is None or not self.may_write(query, name):
            return
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(x['value'] for x in lines if x['key'] == 'header')
        if header.get('parentCommit') not in (None, head['oid']):
            return self.refuse(412, 'A commit has happened since. Please refresh and try again.')
        files = dict(head['files'])
        for line in lines:
            value = line['value']
            if line['key'] == 'file':
                content = base64.b64decode(value['content'])
                oid = hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
                files[value['path']] = dict(oid=oid, size=len(content), lfs=False, content=content)
            elif line['key'] == 'lfsFile':
                if not self.hub.receive(value['oid'], value['size']):
                    return self.refuse(400, 'LFS object was not uploaded')
                files[value['path']] = dict(
                    oid=value['oid'], size=value['size'], lfs=True, content=self.hub.blobs[value['oid']])
            elif line['key'] == 'deletedFile' and files.pop(value['path'], None) is None:
                return self.refuse(400, f'no file {value["path"]}')
        oid = repository.add(header['summary'], files)
        answer = {'success': True, 'commitOid': oid, 'commitUrl': f'{self.hub.endpoint}/{name}/commit/{oid}'}
        if query.get('create_pr'):
            repository.pull_requests += 1
            answer['pullRequestUrl'] = f'{self.hub.endpoint}/{name}/discussions/{repository.pull_requests}'
            repository.branches[f'refs/pr/{repository.pull_requests}'] = oid
        else:
            repository.branches[revision] = oid
        self.send(200, answer)

    def discussions(self, query, name):
        repository = self.find(name)
        if repository:
            found = [
                dict(title='', num=n, author=dict(name='me'), createdAt='2026-01-01T00:00:00.000Z', status='open',
                     repo=dict(name=name, type='model'), isPullRequest=True)
                for n in range(1, repository.pull_requests + 1)]
            self.send(200, dict(count=len(found), start=0, discussions=found))

    def branch(self, query, name, branch):
        repository, head = self.find_commit(name, 'main')
        if head is None or not self.may_write(query, name):
            return
        if branch in repository.branches:
            return self.refuse(409, 'Reference already exists')
        repository.branches[branch] = head['oid']
        self.send(200)

    def tag(self, query, name, revision):
        repository, commit = self.find_commit(name, revision)
        if commit is None or not self.may_write(query, name):
            return
        tag = json.loads(self.body)['tag']
        if tag in repository.tags:
            return self.refuse(409, 'Tag reference exists already')
        repository.tags[tag] = commit['oid']
        self.send(200)

    def tree(self, query, name, revision):
        _, commit = self.find_commit(name, revision)
        if commit:
            self.send(200, [
                {'type': 'file', 'path': p, 'oid': f['oid'] if not f['lfs'] else f['oid'][:40], 'size': f['size'],
                 **({'lfs': {'oid': f['oid'], 'size': f['size'], 'pointerSize': 130}} if f['lfs'] else {})}
                for p, f in sorted(commit['files'].items())])

    def refs(self, query, name):
        repository = self.find(name)
        if repository:
            self.send(200, {
                kind: [{'name': n, 'ref': f'refs/{folder}/{n}', 'targetCommit': c} for n, c in those.items()]
                for kind, folder, those in (
                    ('branches', 'heads', repository.branches), ('tags', 'tags', repository.tags),
                    ('converts', 'convert', {}))})

    def xet_token(self, query, name, kind, revision):
        if self.find(name) is None or (kind == 'write' and not self.may_write(query, name)):
            return
        if not self.hub.xet:
            return self.refuse(404, 'no Xet here')
        until = int(time.time()) + 3600
        self.send(200, {'accessToken': 'xet', 'exp': until, 'casUrl': self.hub.xet.endpoint}, {
            'X-Xet-Cas-Url': self.hub.xet.endpoint, 'X-Xet-Access-Token': 'xet', 'X-Xet-Token-Expiration': str(until)})

    def resolve_cache(self, query, name, revision, path):
        _, commit = self.find_commit(name, revision)
        if commit:
            f = commit['files'][path]
            self.send(200, f['content'], {
                'X-Repo-Commit': revision, 'ETag': f'"{f["oid"]}"', 'Content-Type': 'application/octet-stream'})

    def resolve(self, query, name, revision, path):
        _, commit = self.find_commit(name, revision)
        if commit is None:
            return
        f = commit['files'].get(path)
        if f is None:
            return self.send(404, {'error': 'Entry not found'}, {
                'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': commit['oid']})
        headers = {'X-Repo-Commit': commit['oid'], 'ETag': f'"{f["oid"]}"'}
        if f['lfs']:
            headers.update({'X-Linked-ETag': f'"{f["oid"]}"', 'X-Linked-Size': str(f['size']),
                            'Location': f'{self.hub.storage}/blobs/{f["oid"]}'})
            own = self.hub.xet.list_hashes().get(f['oid']) if self.hub.xet else None
            if own:
                token = f'{self.hub.endpoint}/api/models/{name}/xet-read-token/{commit["oid"]}'
                headers.update({'X-Xet-Hash': own, 'Link': f'<{token}>; rel="xet-auth"'})
            return self.send(302, b'', headers)
        self.send(307, b'', {**headers, 'Location': f'/api/resolve-cache/models/{name}/{commit["oid"]}/{path}'})

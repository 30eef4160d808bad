"""Publishing, with the real client over HTTP against a stand-in Hub: one commit or nothing, whatever fails."""
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
from forks import Forks
from hub_server import GUEST, READ, WRITE, Fault, Hub
from hub_xet import XetStore
from safetensors.torch import load, load_file

import export.__main__
import export.push
from export.images import add_image_options, load_images
from export.publish import create_files
from export.push import Published

ROOT = Path(__file__).parent.parent
WEIGHTS = os.urandom(20_000) + b'\0'
DRIVER = '''
import json, os, sys
from pathlib import Path
import export.push
from export.push import PushError, PushOptions, check_access, push, read_published
from timm_tmblock.errors import InputError
export.push.WAITS = (0.05,)
import huggingface_hub.utils._http as http
real = http.time.sleep
http.time.sleep = lambda seconds: real(min(seconds, 0.05))  # the client's own waits
for line in sys.stdin:
    request = json.loads(line)
    os.environ.pop('HF_TOKEN', None)
    os.environ.update({'HF_TOKEN': request['token']} if request['token'] else {})
    folder, said = Path(request['folder']), []
    files = sorted(p.relative_to(folder) for p in folder.rglob('*') if p.is_file())
    try:
        options = PushOptions(**request['options'])
        text = dict(
            check=lambda: check_access(options), read=lambda: json.dumps(read_published(options).engines),
            push=lambda: push(folder, files, options, said.append))[request['do']]()
        answer = dict(kind='', text=text or '')
    except (InputError, PushError) as e:
        answer = dict(kind=type(e).__name__, text=str(e))
    print(json.dumps(dict(answer, said=said)), flush=True)
'''


class Driver:
    """A process with the real client, which reads where the Hub is when it is imported."""

    def __init__(self, hub, log):
        self.log = log
        with log.open('w') as out:
            self.process = subprocess.Popen(
                [sys.executable, '-c', DRIVER], cwd=ROOT, env=environment(hub, HF_HOME=str(log.parent)),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True)

    def ask(self, folder, token, options, do='push'):
        request = dict(folder=str(folder), token=token, options=dict(dict(repo='me/net'), **options), do=do)
        print(json.dumps(request), file=self.process.stdin, flush=True)


@pytest.fixture(scope='module', params=['lfs', 'xet'])
def server(request, tmp_path_factory):
    store = XetStore(tmp_path_factory.mktemp('xet') / 'store') if request.param == 'xet' else None
    if store and not store.works():
        pytest.skip('this hf_xet has no store on disk')
    hub = Hub(store)
    driver = Driver(hub, tmp_path_factory.mktemp('driver') / 'log')
    yield hub, driver
    driver.process.kill()
    driver.process.communicate()
    hub.close()


@pytest.fixture
def hub(server):
    hub, driver = server
    for state in (hub.repositories, hub.blobs, hub.faults, hub.requests):
        state.clear()
    hub.part_size, hub.default_visibility = 0, 'public'
    hub.driver = driver
    yield hub
    assert hub.leaks == []
    assert not any(secret in driver.log.read_text() for secret in (WRITE, READ, GUEST, 'hf_wrong'))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'files'
    (folder / 'onnx').mkdir(parents=True)
    (folder / 'README.md').write_text('---\nlicense: apache-2.0\n---\n# A model\n')
    (folder / 'config.json').write_text('{"architecture": "rn26_tm"}\n')
    (folder / 'model.safetensors').write_bytes(WEIGHTS)
    (folder / 'onnx' / 'model.onnx').write_bytes(b'\0' + str(tmp_path).encode() + WEIGHTS)
    return folder


@pytest.fixture
def lfs(hub):
    if hub.xet:
        pytest.skip('of plain LFS')
    return hub


@pytest.fixture
def xet(hub):
    if not hub.xet:
        pytest.skip('of Xet')
    return hub


def environment(hub, token=WRITE, **more):
    keep = {k: v for k, v in os.environ.items() if k == 'HF_HOME' or not k.startswith('HF_')}
    return {**keep, 'HF_ENDPOINT': hub.endpoint, 'HF_HUB_DISABLE_XET': '0' if hub.xet else '1',
            'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_TOKEN': token, 'HF_XET_CLIENT_RETRY_MAX_ATTEMPTS': '2',
            'HF_XET_CLIENT_RETRY_BASE_DELAY': '10ms', **more}


def run(hub, folder, token=WRITE, do='push', **options):
    """Name of the error, '' if there was none, and what was said; one sentence, and no token."""
    hub.driver.ask(folder, token, options, do)
    answer = json.loads(hub.driver.process.stdout.readline())
    text = '\n'.join([*answer['said'], answer['text']])
    assert not any(secret in text for secret in (WRITE, READ, GUEST, 'hf_wrong')) and '\n' not in answer['text']
    return answer['kind'], answer['text']


def is_complete(hub, folder, revision='main', name='me/net'):
    commit = hub.repositories[name].find(revision)
    expected = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    return {path: f['content'] for path, f in commit['files'].items()} == expected


def count(hub, name='me/net'):
    """Commits after the one that creating a repository makes."""
    return len(hub.repositories[name].commits) - 1


def test_push_is_one_commit_with_a_tag_and_again_none(hub, folder):
    kind, text = run(hub, folder, private=True, tag='v1', message='First')
    assert kind == '', text
    repository = hub.repositories['me/net']
    assert repository.private and count(hub) == 1 and is_complete(hub, folder)
    assert repository.commits[-1]['message'] == 'First' and repository.tags == {'v1': repository.branches['main']}
    assert f'commit/{repository.branches["main"]}' in text
    assert run(hub, folder, private=True, tag='v1')[0] == '' and count(hub) == 1
    (folder / 'config.json').write_text('{}\n')
    kind, text = run(hub, folder, private=True, tag='v1')
    assert kind == 'InputError' and text == 'The tag v1 already exists on another commit; choose another.'
    assert count(hub) == 1 and run(hub, folder, private=True, tag='v2')[0] == '' and is_complete(hub, folder, 'v2')


def test_exports_of_other_weights_are_removed_and_those_of_the_same_stay(hub, folder):
    assert run(hub, folder)[0] == ''
    (folder / 'onnx' / 'model.onnx').rename(folder / 'onnx' / 'other.onnx')
    assert run(hub, folder)[0] == ''
    both = {'onnx/model.onnx', 'onnx/other.onnx'}
    files = hub.repositories['me/net'].find('main')['files']
    assert both <= set(files)
    for path in ('notes.txt', 'pytorch_model.bin'):  # the latter as timm writes it beside the other file
        files[path] = dict(oid='0' * 40, size=1, lfs=False, content=b'x')
    assert run(hub, folder)[0] == '' and 'pytorch_model.bin' in hub.repositories['me/net'].find('main')['files']
    (folder / 'model.safetensors').write_bytes(WEIGHTS[::-1])
    assert run(hub, folder)[0] == ''
    assert both & set(hub.repositories['me/net'].find('main')['files']) == {'onnx/other.onnx'}
    files = hub.repositories['me/net'].find('main')['files']
    assert 'notes.txt' in files and 'pytorch_model.bin' not in files and count(hub) == 3


@pytest.mark.parametrize('changed, stays', [
    (dict(class_names=['a', 'c']), False), (dict(preprocessing=dict(crop_pct=0.9)), False), (dict(versions={}), True)])
def test_exports_with_other_class_names_or_preprocessing_are_removed(hub, folder, changed, stays):
    said = folder / 'onnx' / 'model.onnx.json'
    network = dict(weights_sha256='0', class_names=['a', 'b'], preprocessing=dict(crop_pct=1.0))
    said.write_text(json.dumps(network))
    other = folder / 'engines' / 'a' / 'x.engine'
    other.parent.mkdir(parents=True)
    other.write_bytes(b'of the first push alone')
    assert run(hub, folder)[0] == ''
    other.unlink()
    said.write_text(json.dumps({**network, **changed}))
    assert run(hub, folder, tag='v1')[0] == ''
    assert ('engines/a/x.engine' in hub.repositories['me/net'].find('main')['files']) == stays
    assert run(hub, folder, tag='v1')[0] == '' and count(hub) == 2


def test_branch_and_pull_request(hub, folder):
    hub.create('me/net')
    assert run(hub, folder, revision='next')[0] == ''
    assert is_complete(hub, folder, 'next') and hub.repositories['me/net'].find('main')['files'] == {}
    kind, text = run(hub, folder, token=GUEST, create_pr=True)
    assert kind == '' and '/discussions/1' in text and is_complete(hub, folder, 'refs/pr/1')
    assert hub.repositories['me/net'].find('main')['files'] == {}


def test_a_pull_request_is_opened_once(hub, folder):
    hub.create('me/net')
    hub.faults.append(Fault('POST', COMMIT, after=True, cut=True))  # opened, but the answer was lost
    addresses = [run(hub, folder, token=GUEST, create_pr=True) for _ in range(2)]
    assert addresses[0] == addresses[1] == ('', f'{hub.endpoint}/me/net/discussions/1')
    assert hub.repositories['me/net'].pull_requests == 1 and count(hub) == 1
    (folder / 'config.json').write_text('{}')
    assert run(hub, folder, token=GUEST, create_pr=True)[1].endswith('/discussions/2')
    assert run(hub, folder)[0] == '' and run(hub, folder, create_pr=True) == ('', f'{hub.endpoint}/me/net')
    assert hub.repositories['me/net'].pull_requests == 2


def test_an_open_pull_request_goes_on(hub, folder):
    hub.create('me/net')
    assert run(hub, folder, token=GUEST, create_pr=True)[1].endswith('/discussions/1')
    (folder / 'config.json').write_text('{"b": 2}')
    assert run(hub, folder, revision='refs/pr/1')[0] == ''
    assert is_complete(hub, folder, 'refs/pr/1') and hub.repositories['me/net'].find('main')['files'] == {}
    assert hub.repositories['me/net'].pull_requests == 1
    kind, text = run(hub, folder, revision='refs/pr/2')
    assert kind == '_Missing' and 'me/net or its revision is not there' in text
    assert not any('/branch/' in request for request in hub.requests)


@pytest.mark.parametrize('token, options, message', [
    (GUEST, dict(create_pr=True, revision='next'), '--revision names a branch to push to, and a pull request has its'),
    (None, {}, 'There is no Hub token here; run "hf auth login" or set HF_TOKEN'),
    ('hf_wrong', {}, 'The Hub does not accept the token'),
    (READ, {}, 'The token may only read; use one with write access'),
    (READ, dict(create_pr=True), 'The token may only read; use one with write access'),
    (WRITE, dict(deadline=0.), '--deadline must be above 0 and at most .* seconds, not 0'),
    (WRITE, dict(message=' '), '--message must not be empty'),
    (WRITE, dict(tag='release 1'), "--tag 'release 1' is no name that git takes; use letters, digits"),
    (WRITE, dict(revision='next..'), "--revision 'next..' is no name that git takes"),
    (WRITE, dict(tag='v/.x'), 'is no name that git takes'), (WRITE, dict(tag='a.lock/b'), 'is no name that git takes'),
    (WRITE, dict(repo='no'), "'no' is not a repository name: its owner comes first, USER/no"),
    (WRITE, dict(repo='a b/c'), "'a b/c' is not a repository name"),
    (WRITE, dict(create_pr=True), 'There is no repository me/net for a pull request'),
    (GUEST, dict(repo='other/net'), 'The Hub does not let this token'),
    (WRITE, dict(create_pr=True, tag='v1'), '--tag names a commit of the repository'),
    (WRITE, dict(revision='refs/pr/1', tag='v1'), '--tag names a commit of the repository'),
    (WRITE, dict(revision='refs/pr/1'), 'There is no repository me/net for a pull request'),
])
def test_what_the_user_can_mend_is_one_sentence_and_uploads_nothing(hub, folder, token, options, message):
    kind, text = run(hub, folder, token, **options)
    assert kind in ('InputError', '_Missing') and re.search(message, text), text
    assert not hub.has_been_sent() and not any('commit/' in r for r in hub.requests)


@pytest.mark.parametrize('visibility', ['public', 'private'])
def test_new_repository_is_as_its_owner_has_them_by_default(hub, folder, visibility):
    hub.default_visibility = visibility
    assert run(hub, folder)[0] == '' and hub.repositories['me/net'].private == (visibility == 'private')


def test_private_push_never_goes_to_a_public_repository(hub, folder):
    hub.create('me/net')
    kind, text = run(hub, folder, private=True)
    assert kind == 'InputError' and 'me/net already exists and is public' in text
    assert not hub.has_been_sent() and count(hub) == 0


@pytest.mark.parametrize('in_header', [False, True])
@pytest.mark.parametrize('path', ['/preupload/', '/commit/main'])
def test_reason_of_a_refusal_is_told(hub, folder, path, in_header):
    hub.create('me/net')
    told = dict(headers={'X-Error-Message': 'Storage limit reached'}, body=b'{}') if in_header else dict(
        body=b'{"error": "Storage limit reached"}')
    hub.faults.append(Fault('POST', path, status=403, **told))
    kind, text = run(hub, folder)
    assert kind == 'InputError' and count(hub) == 0
    assert 'The Hub does not let this token commit (HTTP 403, Storage limit reached); if it lacks write access' in text


CHECK = '''
import sys, export.push
from timm_tmblock.errors import InputError
try:
    export.push.check_access(export.push.PushOptions(**eval(sys.argv[1])))
except InputError as e:
    print(e)
'''


@pytest.mark.parametrize('options, environ, message', [
    (dict(repo='me/net'), {}, ''),
    (dict(repo='me/new', private=True, tag='v1'), {}, ''),  # yet to be created
    (dict(repo='me/net', tag='v2'), {}, ''),
    (dict(repo='me/net', tag='v1', revision='next'), {}, ''),  # so is the branch
    (dict(repo='me/net', tag='v1'), {}, 'The tag v1 already exists on another commit; choose another'),
    (dict(repo='me/net', private=True), {}, 'me/net already exists and is public'),
    (dict(repo='me/net'), READ, 'The token may only read'),
    (dict(repo='me/net', create_pr=True), GUEST, ''),
    (dict(repo='me/new', create_pr=True), GUEST, 'There is no repository me/new for a pull'),
    (dict(repo='me/net'), dict(HF_HUB_OFFLINE='1'), 'HF_HUB_OFFLINE is set, so the Hub cannot be reached; unset it'),
    (dict(repo='me/net'), dict(HF_ENDPOINT='{}/elsewhere'), 'There is no Hub at .*/elsewhere to sign in to'),
])
def test_what_makes_a_push_impossible_is_found_before_the_work(lfs, folder, options, environ, message):
    assert run(lfs, folder, tag='v1')[0] == ''
    (folder / 'config.json').write_text('{"a": 1}')
    assert run(lfs, folder)[0] == ''
    if not environ or isinstance(environ, str):  # a token
        kind, text = run(lfs, folder, environ or WRITE, do='check', **options)
        assert (kind == '') is (message == '') and re.match(message or '$', text), text
        return
    # which the client reads when it is imported
    environ = {key: value.format(lfs.endpoint) for key, value in environ.items()}
    checked = subprocess.run(
        [sys.executable, '-c', CHECK, repr(options)], cwd=ROOT, env=environment(lfs, **environ), capture_output=True,
        text=True)
    assert checked.returncode == 0 and re.match(message or '$', checked.stdout), checked.stdout + checked.stderr


@pytest.mark.parametrize('same', [True, False])
def test_onnx_files_that_are_left_out_go_and_engines_of_the_network_stay(hub, folder, same):
    about = dict(weights_sha256='a', class_names=['x', 'y'], preprocessing={})
    files = {'onnx/model.onnx.json': json.dumps(about), 'onnx/model_int8.onnx': 'int8',
             'onnx/model_int8.onnx.json': '{}', 'onnx/by_hand.onnx': 'other', 'onnx/model_quantized.onnx': 'of others',
             'engines/a/x.engine': 'plan', 'engines/a/x.engine.json': json.dumps(about)}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert run(hub, folder)[0] == ''
    for name in list(files)[1:]:
        (folder / name).unlink()
    # other bytes of the same weights, as another version of safetensors may write them
    (folder / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes() + b' ')
    (folder / 'onnx/model.onnx.json').write_text(json.dumps(about if same else dict(about, weights_sha256='b')))
    assert run(hub, folder)[0] == ''
    left = {path for path in hub.repositories['me/net'].find('main')['files'] if path in files}
    assert left == {'onnx/model.onnx.json'} | (
        {path for path in files if 'int8' not in path} if same else set())


def test_sources_of_engines_that_are_pushed_anew_go(hub, folder):
    about = dict(weights_sha256='a', class_names=['x', 'y'], preprocessing={})
    engine, other = 'engines/a/x.engine', 'engines/a/of_another_machine.engine'

    def write(path, content):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content if isinstance(content, str) else json.dumps(content))

    def build(path, source):
        write(path, 'plan')
        write(f'{path}.json', dict(about, engine=dict(onnx=source)))
        for name in (source, f'{source}.json'):
            write(f'engines/a/{name}', 'onnx')

    write('onnx/model.onnx.json', about)
    build(engine, 'x-00000000.onnx')
    build(other, 'y-11111111.onnx')
    for path in ('engines/a/by_hand.onnx', 'engines/b/z-22222222.onnx', 'engines/a/notes.json'):
        write(path, 'of others')
    assert run(hub, folder)[0] == ''
    for path in (folder / 'engines').rglob('*.*'):
        path.unlink()
    build(engine, 'x-33333333.onnx')
    assert run(hub, folder)[0] == ''
    found = {path for path in hub.repositories['me/net'].find('main')['files'] if path.startswith('engines/')}
    assert found == {
        *(f'{path}{end}' for path in (engine, other, 'engines/a/x-33333333.onnx', 'engines/a/y-11111111.onnx')
          for end in ('', '.json')),
        'engines/a/by_hand.onnx', 'engines/b/z-22222222.onnx', 'engines/a/notes.json'}


def test_card_the_hub_refuses_ends_the_push_before_anything_is_sent(hub, folder):
    (folder / 'README.md').write_text('---\nlicense: apache-2.0\nwidget: no\n---\n')
    kind, text = run(hub, folder)
    assert kind == 'InputError' and '"widget" must be an array' in text
    assert not hub.has_been_sent() and count(hub) == 0


COMMIT, YAML, CREATE = r'/commit/main', r'/api/validate-yaml', '/api/repos/create'
BATCH, VERIFY, TOKEN = r'/info/lfs/objects/batch', '/info/lfs/objects/verify', '/xet-write-token/'
BUSY = b'{"error": "Cannot create repo: another conflicting operation is in progress"}'


@pytest.mark.parametrize('faults', [
    [Fault('POST', COMMIT, status=503, times=3)],
    [Fault('POST', COMMIT, status=504, after=True)],
    [Fault('POST', COMMIT, cut=True, after=True)],
    [Fault('POST', COMMIT, cut=True)],
    [Fault('POST', COMMIT, status=429, headers={'Retry-After': '0'})],
    [Fault('POST', COMMIT, status=429, headers={'RateLimit': '"api";r=0;t=0', 'Retry-After': '9999'})],
    [Fault('POST', COMMIT, status=412, body=b'{"error": "A commit has happened since"}')],
    [Fault('POST', YAML, status=503, body=b'<html>busy</html>')],
    [Fault('POST', '/preupload/', status=502)],
    [Fault('POST', CREATE, status=500)],
    [Fault('POST', CREATE, status=409, body=BUSY, times=3)],
    [Fault('POST', CREATE, cut=True, after=True)],
    [Fault('GET', '/api/whoami-v2', status=503)],
    [Fault('POST', '/tag/', cut=True, after=True)],
    [Fault('POST', '/tag/', status=503)],
    [Fault('GET', '/refs', status=503)],
    [Fault('GET', '/tree/', status=500)],
    [Fault('POST', CREATE, status=429, headers={'Retry-After': '0'})],
    [Fault('POST', YAML, cut=True)],
    [Fault('POST', '/preupload/', status=408)],
    [Fault('POST', '/preupload/', status=429, headers={'Retry-After': '0'})],
    [Fault('POST', '/tag/', status=429)],
], ids=lambda faults: ' '.join(f'{f.path}-{f.status or "cut"}{"-after" * f.after}' for f in faults))
def test_what_passes_is_tried_again_and_makes_one_commit(hub, folder, faults):
    check_tried_again(hub, folder, faults)


@pytest.mark.parametrize('part_size', [0, 6000])
@pytest.mark.parametrize('faults', [
    [],
    [Fault('POST', BATCH, status=500, times=2), Fault('PUT', 'blobs|parts', status=503, times=2)],
    [Fault('PUT', 'blobs|parts', cut=True, times=2)],
    [Fault('PUT', 'blobs|parts', status=403)],  # an address that has expired
    [Fault('POST', VERIFY, status=500)],
], ids=['none', 'busy', 'cut', 'expired', 'verify'])
def test_lfs_uploads_whole_and_in_parts_are_tried_again(lfs, folder, faults, part_size):
    lfs.part_size = part_size
    check_tried_again(lfs, folder, faults)
    assert any('/parts/' in r for r in lfs.requests) == bool(part_size)


@pytest.mark.parametrize('fault', [Fault('GET', TOKEN, status=503), Fault('GET', TOKEN, cut=True)], ids=['busy', 'cut'])
def test_xet_uploads_are_tried_again(xet, folder, fault):
    check_tried_again(xet, folder, [fault])
    assert not any('/lfs/' in r for r in xet.requests)


@pytest.mark.parametrize('status, expected', [
    (401, 'InputError: The Hub does not accept the token'),
    (403, 'InputError: The Hub does not let this token commit ('),
    (404, 'PushError: Could not commit: '),  # the repository has just been found
    (503, 'PushError: Could not commit: '),
])
def test_xet_that_refuses_or_fails_for_good_is_one_sentence(xet, folder, status, expected):
    xet.create('me/net')
    xet.faults.append(Fault('GET', TOKEN, status=status, times=99))
    kind, text = run(xet, folder)
    assert f'{kind}: {text}'.startswith(expected), text
    assert count(xet) == 0


def check_tried_again(hub, folder, faults):
    hub.faults += [replace(f) for f in faults]
    kind, text = run(hub, folder, tag='v1')
    assert kind == '', text
    assert all(f.times == 0 for f in hub.faults)
    assert count(hub) == 1 and is_complete(hub, folder)
    assert hub.repositories['me/net'].tags == {'v1': hub.repositories['me/net'].branches['main']}


def test_others_commit_in_between_is_kept(hub, folder):
    repository = hub.create('me/net')

    class Race(Fault):
        @property
        def status(self):
            if self.times == 0 and not repository.find('main')['files']:  # as it is answered
                other = dict(oid='0' * 40, size=1, lfs=False, content=b'x')
                repository.branches['main'] = repository.add('of somebody else', {'NOTES.md': other})
            return 0

        @status.setter
        def status(self, value):
            pass

    hub.faults.append(Race('POST', '/preupload/'))
    kind, text = run(hub, folder)
    assert kind == '', text
    files = repository.find('main')['files']
    assert files['NOTES.md']['content'] == b'x' and files['model.safetensors']['content'] == WEIGHTS and count(hub) == 2


@pytest.mark.parametrize('fault, message', [
    (Fault('POST', COMMIT, status=503, times=99), 'Could not commit: HTTP 503'),
    (Fault('GET', '/api/models/me/net', status=500, times=99), 'Could not look for the repository: HTTP 500'),
])
def test_what_does_not_pass_ends_with_one_sentence_and_nothing_published(hub, folder, fault, message):
    hub.create('me/net')
    hub.faults.append(replace(fault))
    kind, text = run(hub, folder)
    assert kind == 'PushError' and message in text and text.endswith('try again later.')
    assert count(hub) == 0


def test_lfs_storage_that_fails_for_good_is_one_sentence(lfs, folder):
    lfs.create('me/net')
    lfs.faults.append(Fault('PUT', '/blobs/', status=503, times=999))
    kind, text = run(lfs, folder)
    assert kind == 'PushError' and 'Could not commit: HTTP 503' in text and count(lfs) == 0


@pytest.mark.parametrize('fault', [
    Fault('POST', COMMIT, delay=5, cut=True),
    Fault('POST', CREATE, status=409, body=BUSY, times=10 ** 9),  # which the client asks again without end
], ids=['commit', 'create'])
def test_deadline_ends_a_push_that_hangs(lfs, folder, tmp_path, fault):
    hub = lfs
    if fault.path == COMMIT:
        hub.create('me/net')
    hub.driver = Driver(hub, tmp_path / 'log')
    hub.faults.append(replace(fault))
    kind, text = run(hub, folder, deadline=2.)
    assert kind == 'DeadlineError' and 'The Hub did not finish within 2 s' in text
    hub.driver.process.kill()  # as the end of the command does with what hangs
    hub.driver.process.communicate()


def test_push_that_is_interrupted_waits_for_no_thread(monkeypatch):
    def interrupt(self, timeout=None):
        raise KeyboardInterrupt

    ended = threading.Event()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(threading.Thread, 'join', interrupt)
        export.push._within(60, ended.wait)
    assert export.push._hanging
    ended.set()
    export.push._within(60, int)
    assert not export.push._hanging


@pytest.mark.parametrize('there', [{}, {'engines/b/x.engine': {}}])
def test_engines_that_others_push_meanwhile_are_not_lost_from_the_card(monkeypatch, capsys, there):
    answers, pushed = iter([Published(), Published(there)]), []
    for name, stand_in in (
            ('push.check_access', lambda options: None), ('push.read_published', lambda options: next(answers)),
            ('load.load', lambda *args: SimpleNamespace(pretrained_cfg={}, state_dict=dict)),
            ('images.load_images', lambda *args, **kwargs: None), ('publish.create_files', lambda *args: []),
            ('push.push', lambda *args: pushed.append(args))):
        monkeypatch.setattr(f'export.{name}', stand_in)
    command = ['push', 'rn26_tm', '--repo', 'me/net']
    if there:
        with pytest.raises(SystemExit) as ended:
            export.__main__.main(command)
        assert ended.value.code == 1
        assert 'Another machine pushed engines to me/net meanwhile; run the same' in capsys.readouterr().err
    else:
        export.__main__.main(command)
    assert len(pushed) == (not there)


def test_flags_of_the_command_are_what_is_pushed(monkeypatch, tmp_path):
    seen = {}

    def record(name, function, answer):
        def stand_in(*args, **kwargs):
            seen[name] = inspect.signature(function).bind(*args, **kwargs).arguments
            return answer
        return stand_in

    network = SimpleNamespace(pretrained_cfg={}, state_dict=dict)
    for name, function, answer in (
            ('push.check_access', export.push.check_access, None),
            ('load.load', lambda model, checkpoint: None, network),
            ('push.read_published', export.push.read_published, Published()), ('push.push', export.push.push, 'there'),
            ('publish.create_files', create_files, []), ('images.load_images', load_images, None)):
        monkeypatch.setattr(f'export.{name}', record(name.partition('.')[2], function, answer))
    card = tmp_path / 'CARD.md'
    card.write_text('---\nlicense: mit\n---\n')
    flags = ['--precisions', 'bf16', 'int8', '--engines', 'a.engine', 'b.plan', '--card', str(card), '--create-pr',
             '--message', 'Hi', '--deadline', '7', '--private', '--checkpoint', 'w.safetensors']
    export.__main__.main(['push', 'rn26_tm', '--repo', 'me/net', *flags])
    options = export.push.PushOptions('me/net', private=True, message='Hi', create_pr=True, deadline=7.)
    assert seen['push']['options'] == seen['check_access']['options'] == options
    files = seen['create_files']
    assert files['precisions'] == ['bf16', 'int8'] and files['engines'] == [Path('a.engine'), Path('b.plan')]
    assert (files['card'], files['weights_file'], files['keep_card']) == (card, Path('w.safetensors'), False)
    assert (files['model'], files['repo'], files['published']) == (network, 'me/net', Published())
    assert seen['load_images']['calibrate'] is True
    export.__main__.main(['push', 'rn26_tm', '--repo', 'me/net', '--revision', 'next', '--tag', 'v1', '--keep-card'])
    assert seen['push']['options'] == export.push.PushOptions('me/net', revision='next', tag='v1')
    assert seen['create_files']['keep_card'] is False  # there is none


def test_sidecar_that_may_not_be_read_is_an_error(lfs, folder):
    hub = lfs
    (folder / 'engines' / 'a').mkdir(parents=True)
    for name in ('x.engine', 'x.engine.json'):
        (folder / 'engines' / 'a' / name).write_text('{}')
    assert run(hub, folder)[0] == ''
    hub.faults.append(Fault('HEAD', '/resolve/.*json', status=404, headers={'X-Error-Code': 'RepoNotFound'}))
    kind, text = run(hub, folder, do='read')
    assert kind == '_Missing' and text.endswith('is not there, or the token may not see it; check both.')
    hub.faults.clear()
    assert run(hub, folder, do='read') == ('', '{"engines/a/x.engine": {}}')


LEAVE = '''
import sys, export.push
from pathlib import Path
export.push.SIGN_IN = float(sys.argv[2])
folder = Path(sys.argv[1])
files = sorted(p.relative_to(folder) for p in folder.rglob('*') if p.is_file())
try:
    export.push.check_access(export.push.PushOptions('me/net'))
    export.push.push(folder, files, export.push.PushOptions('me/net', deadline=2.))
except export.push.DeadlineError as e:
    print(e, file=sys.stderr)
finally:
    export.push.leave_hanging(1)
'''


@pytest.mark.parametrize('fault, sign_in, said', [
    (Fault('PUT', '/blobs/', delay=60, times=9), 60, 'within 2 s; the repository has all of the commit or nothing, so'),
    (Fault('GET', '/api/whoami-v2', delay=60, times=9), 1, 'within 1 s.')])
def test_process_ends_where_the_hub_never_answers(lfs, folder, tmp_path, fault, sign_in, said):
    lfs.create('me/net')
    lfs.faults.append(replace(fault))
    env = environment(lfs, HF_HOME=str(tmp_path))
    ended = subprocess.run(
        [sys.executable, '-c', LEAVE, str(folder), str(sign_in)], cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=50)
    assert ended.returncode == 1 and f'The Hub did not finish {said}' in ended.stderr
    assert count(lfs) == 0


def test_killed_push_leaves_the_repository_as_it_was_and_the_next_one_finishes(hub, folder, tmp_path):
    hub.create('me/net')
    fault = Fault('GET', TOKEN, delay=60) if hub.xet else Fault('PUT', '/blobs/', delay=60)
    hub.faults.append(fault)
    driver = Driver(hub, tmp_path / 'log')
    driver.ask(folder, WRITE, {})
    end = time.monotonic() + 60
    while fault.times and time.monotonic() < end:
        time.sleep(0.05)
    driver.process.kill()  # SIGKILL
    driver.process.communicate()
    assert count(hub) == 0 and fault.times == 0
    assert run(hub, folder)[0] == '' and count(hub) == 1 and is_complete(hub, folder)


@pytest.mark.parametrize('path, options', [
    ('/tree/', {}), ('/tree/refs%2Fpr%2F1', dict(token=GUEST, create_pr=True))])
def test_arrived_content_is_verified(hub, folder, path, options):
    hub.create('me/net')
    tree = [{'type': 'file', 'path': 'README.md', 'oid': '0' * 40, 'size': 3}]
    hub.faults.append(Fault('GET', path, status=200, body=json.dumps(tree).encode(), times=9))
    kind, text = run(hub, folder, **options)
    assert kind == 'PushError' and 'on the Hub is not what was pushed; run the same command again' in text


@pytest.fixture(scope='module')
def forks_of_hub(server, tmp_path_factory):
    """Programs that know the server, whose client reads its address when it is imported."""
    if server[0].xet:
        pytest.skip('of plain LFS')
    env = environment(server[0], HF_HOME=str(tmp_path_factory.mktemp('hf')), OMP_NUM_THREADS='1')
    modules = 'train.train', 'datasets', 'torch.onnx', 'onnxscript', 'export.__main__', 'export.push'
    with Forks(*modules, env=env) as server:
        yield server


def test_training_publishes_its_weights_and_a_failure_does_not_lose_them(lfs, forks_of_hub, tmp_path):
    hub = lfs
    from timm_tmblock.checkpoint import load_model
    command = [
        'train/train.py', '--train-split', 'train[:36]', '--val-split', 'test[:15]', '--batch-size',
        '12', '--epochs', '1', '--device', 'cpu', '--report-to', 'none', '--output', str(tmp_path), '--experiment', 'a',
        '--push-to-hub', 'me/run']
    hub.faults += [Fault('GET', '/api/whoami-v2', status=422), Fault('POST', CREATE, status=403)]
    failed = forks_of_hub.run(*command)
    result = json.loads(failed.stdout.splitlines()[-1])
    assert failed.returncode == 0 and result['pushed'] is None and load_model(result['weights']['best'])
    assert 'The Hub could not be asked about the token (Could not sign in: HTTP 422' in failed.stderr
    assert 'was not pushed: The Hub does not let this token create the repository (HTTP 403' in failed.stderr
    assert f'python -m export push {result["weights"]["best"]} --repo me/run ' in failed.stderr
    hub.faults.clear()
    code = (
        'import sys; from pathlib import Path; from train.config import parse_args; from train.publish import publish;'
        'print(publish(Path(sys.argv[1]), parse_args(sys.argv[2:])))')
    flags = ['--val-split', 'test[:15]', '--push-to-hub', 'me/run', '--hub-private']
    pushed = forks_of_hub.run('-c', code, result['weights']['best'], *flags)
    assert '/me/run/commit/' in pushed.stdout, pushed.stderr
    files = hub.repositories['me/run'].find('main')['files']
    assert hub.repositories['me/run'].private and count(hub, 'me/run') == 1 and 'onnx/model_fp16.onnx' in files
    measured = f'Top-1 {result["best"]["top1"]:.2f} %, top-5 {result["best"]["top5"]:.2f} % on 15 images'
    assert measured in files['README.md']['content'].decode()
    expected = load_file(result['weights']['best'])
    assert all((v == expected[k]).all() for k, v in load(files['model.safetensors']['content']).items())
    # the end of a run that is resumed leaves what the repository has of the same weights
    again = forks_of_hub.run('-c', code, result['weights']['best'], *flags)
    assert again.stdout == f'{hub.endpoint}/me/run\n' and count(hub, 'me/run') == 1
    assert again.stderr.endswith('me/run has these weights already and is left as it is.\n')
    # nor does another machine, which has no run, take the accuracy off the card
    more = ['--precisions', 'fp32', 'bf16', '--check-images', '20', '--private']
    other = forks_of_hub.run('-m', 'export', 'push', 'hf-hub:me/run', '--repo', 'me/run', *more)
    assert other.returncode == 0 and count(hub, 'me/run') == 2, other.stderr
    card = hub.repositories['me/run'].find('main')['files']['README.md']['content'].decode()
    assert measured in card and 'bf16 is for TensorRT: ONNX Runtime has no CPU kernels for it' in card


def test_token_is_asked_about_before_the_training(lfs, forks_of_hub, tmp_path):
    out = tmp_path / 'out'
    command = ['train/train.py', '--device', 'cpu', '--output', str(out), '--push-to-hub', 'me/run']
    lfs.faults.append(Fault('GET', '/api/whoami-v2', status=401))
    for token, message in (('', 'no Hub token here; run "hf auth login"'), (None, 'does not accept the token')):
        ended = forks_of_hub.run(*command, **({} if token is None else dict(HF_TOKEN=token)))
        assert ended.returncode == 2 and message in ended.stderr and ended.stdout == ''
        assert len(ended.stderr.splitlines()) == 1 and not out.exists()


DOWNLOAD = '''
import sys
import huggingface_hub.utils._http as http
from huggingface_hub import hf_hub_download
real = http.time.sleep
http.time.sleep = lambda seconds: real(min(seconds, 0.05))
for path in sys.argv[1:]:
    print(open(hf_hub_download('me/net', path), 'rb').read().hex())
'''


TRUNCATED = [Fault('HEAD', '/resolve/', status=503), Fault('GET', '/blobs/', truncate=9000, times=2)]


@pytest.mark.parametrize('of_xet, disable_xet, faults', [
    (False, '1', []), (False, '1', TRUNCATED), (False, '1', [Fault('GET', '/resolve-cache/', truncate=5)]),
    (True, '0', []), (True, '0', [Fault('GET', '/xet-read-token/', status=503)]),
    (True, '1', []), (True, '1', TRUNCATED)])
def test_pushed_files_are_downloaded_whole_by_either_transport(hub, folder, tmp_path, of_xet, disable_xet, faults):
    if of_xet != bool(hub.xet):
        pytest.skip('of the other server')
    assert run(hub, folder)[0] == ''
    hub.faults += [replace(f) for f in faults]
    names = ['config.json', 'model.safetensors', 'onnx/model.onnx']
    env = environment(hub, HF_HOME=str(tmp_path / 'hf'), HF_HUB_DISABLE_XET=disable_xet)
    got = subprocess.run([sys.executable, '-c', DOWNLOAD, *names], env=env, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    assert [bytes.fromhex(line) for line in got.stdout.split()] == [(folder / n).read_bytes() for n in names]
    assert any('xet-read-token' in r for r in hub.requests) == bool(hub.xet and disable_xet == '0')
    assert all(f.times == 0 for f in hub.faults)


def test_command_publishes_what_it_lists(lfs, forks_of_hub):
    hub = lfs
    flags = ['--precisions', 'fp32', '--tag', 'v1', '--check-images', '20']
    command = ['-m', 'export', 'push', 'rn26_tm', '--repo', 'me/birds', *flags]
    pushed = forks_of_hub.run(*command)
    assert pushed.returncode == 0, pushed.stderr
    files = hub.repositories['me/birds'].find('v1')['files']
    assert set(files) == {
        'README.md', 'config.json', 'model.safetensors', 'runtime.py', 'block.png', 'evaluation.png', 'explained.png',
        'words.png', 'onnx/model.onnx', 'onnx/model.onnx.json'}
    assert set(files) <= set(re.findall(r'[\w./]+', pushed.stdout))
    card = files['README.md']['content'].decode()
    assert set(re.findall(r'onnx/[\w.]+', card)) == {'onnx/model.onnx'} and 'on a CPU:\n20 images of' in card
    assert count(hub, 'me/birds') == 1 and files['runtime.py']['content'] == (ROOT / 'export/runtime.py').read_bytes()
    # engines of another machine stay, and stay on the card; those of another network and what is no sidecar do not
    network = json.loads(files['onnx/model.onnx.json']['content'])
    built = dict(
        backend='tensorrt', version='10.16.0', version_compatible=False, hardware_compatibility='none', command='',
        options={}, onnx='../onnx/model.onnx', onnx_sha256='0' * 64,
        gpu=dict(name='NVIDIA L4', compute_capability='8.9'), profiles=[[[n, 3, 32, 32] for n in (1, 16, 64)]])
    about = dict(network, engine=built, precision='fp16', file_bytes=2_000_000)
    others = [dict(about, weights_sha256='0' * 64), [], dict(about, class_names=about['class_names'][::-1])]
    for name, content in zip('abcd', [about, *others]):
        text = json.dumps(content).encode()
        for path, data in ((f'engines/{name}/x.engine', b'plan'), (f'engines/{name}/x.engine.json', text)):
            files[path] = dict(oid=hashlib.sha1(data).hexdigest(), size=len(data), lfs=False, content=data)
    command[command.index('v1')] = 'v2'
    again = forks_of_hub.run(*command)
    assert again.returncode == 0, again.stderr
    card = hub.repositories['me/birds'].find('v2')['files']['README.md']['content'].decode()
    assert [line for line in card.splitlines() if line.startswith('| `engines/')] == [
        '| `engines/a/x.engine` | fp16 | 2.00 | tensorrt 10.16.0 | compute capability 8.9 (NVIDIA L4) | 1 to 64 |']
    # a card that was edited on the Hub is kept to the byte
    edited = 'Aves – by hand, without front matter.\r\n'.encode()
    files = hub.repositories['me/birds'].find('v2')['files']
    files['README.md'] = dict(
        oid=hashlib.sha1(b'blob %d\0' % len(edited) + edited).hexdigest(), size=len(edited), lfs=False, content=edited)
    command[command.index('v2')] = 'v3'
    kept = forks_of_hub.run(*command, '--keep-card')
    assert kept.returncode == 0, kept.stderr
    assert hub.repositories['me/birds'].find('v3')['files']['README.md']['content'] == edited
    before = count(hub, 'me/birds')
    hub.faults.append(Fault('GET', '/api/whoami-v2', status=422, times=9))
    failed = forks_of_hub.run(*command)
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith('error: Could not sign in: HTTP 422')
    assert count(hub, 'me/birds') == before


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp('published')
    model = timm.create_model('rn26_tm', pretrained=True).eval()
    parser = ArgumentParser()
    add_image_options(parser)
    images = load_images(parser.parse_args(['--check-images', '20']), model, calibrate=False)
    create_files(folder, model, 'me/net', ['fp32'], [], images)
    return folder


def test_what_was_pushed_loads_in_timm_transformers_and_the_runtime(lfs, published, tmp_path):
    hub = lfs
    assert run(hub, published, tag='v1')[0] == ''
    code = '''
import sys, torch, timm, timm_tmblock
from export.runtime import load
a, b = (timm.create_model(n, pretrained=True).eval() for n in ('rn26_tm', 'hf-hub:me/net@v1'))
x = torch.randn(3, 3, 32, 32)
with torch.inference_mode():
    assert torch.equal(a(x), b(x))
assert b.pretrained_cfg['label_names'][8] == 'ship'
from transformers import AutoModelForImageClassification
c = AutoModelForImageClassification.from_pretrained('me/net', revision='v1').eval()
with torch.inference_mode():
    assert type(c).__name__ == 'TimmWrapperForImageClassification' and torch.equal(a(x), c(x).logits)
assert c.config.id2label[8] == 'ship'
print(load('me/net', 'cpu', revision='v1')('train/sample/images/ship.png').label)
'''
    env = environment(hub, HF_HOME=str(tmp_path))
    loaded = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert loaded.returncode == 0 and loaded.stdout.strip() == 'ship', loaded.stderr

"""Drop an image: its class, and which regions matched which class. ONNX Runtime on a CPU, without PyTorch.

    python app.py                                 # the ONNX files in models/
    MODELS="user/rn26_tm, user/rn38_tm" python app.py    # repositories on the Hugging Face Hub
"""
import base64
import io
import os
from html import escape
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union
from uuid import uuid4

import gradio as gr
import numpy as np
import runtime
from PIL import Image

HERE = Path(__file__).parent
NOTHING = 'nothing'
GOLD = (255, 200, 0)
CSS = """
.tm-result { position: relative; margin-bottom: 1.5rem; }
.tm-result h2 { margin: 0 0 .5rem; font-size: 1.1rem; }
.tm-view { position: relative; display: flex; flex-wrap: wrap; gap: 1rem; --side: min(18rem, 100%); --ratio: 1; }
.tm-seen { flex: 0 0 var(--side); width: var(--side); aspect-ratio: var(--ratio); }
.tm-seen > img { width: 100%; height: 100%; image-rendering: pixelated; }
.tm-result.tm-mapped .tm-seen > img { filter: grayscale(1) brightness(.75); }
.tm-grid { position: absolute; top: 0; left: 0; z-index: 2; width: var(--side); aspect-ratio: var(--ratio);
    display: grid; }
.tm-grid i:is(:hover, :focus) { outline: 2px solid white; box-shadow: inset 0 0 0 1px black; }
.tm-grid i:is(:hover, :focus)::after { content: attr(title); position: absolute; left: 0; bottom: 0; max-width: 100%;
    padding: .1rem .4rem; background: black; color: white; font-style: normal; pointer-events: none; }
.tm-rows { flex: 1 1 14rem; min-width: 0; max-height: 24rem; overflow-y: auto; border: 0; padding: 0; margin: 0; }
.tm-row { display: grid; grid-template-columns: 1.1rem minmax(4rem, 2fr) minmax(2rem, 1fr) 4rem 3.6rem; gap: .4rem;
    align-items: center; padding: .2rem .3rem; font-variant-numeric: tabular-nums; border-radius: .3rem; }
.tm-head { opacity: .7; font-size: .85rem; }
.tm-row input { appearance: auto; width: 1rem; height: 1rem; margin: 0; accent-color: rgb(190, 140, 0); }
.tm-row input:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
.tm-row:has(input) { cursor: pointer; }
.tm-row:has(input):hover, .tm-row:has(:checked) { background: rgba(255, 200, 0, .25); }
.tm-row > span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: right; }
.tm-row > span.tm-name { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.tm-bar { height: .7rem; border-radius: .35rem; background: rgba(128, 128, 128, .25); overflow: hidden; }
.tm-bar b { display: block; height: 100%; background: rgb(255, 200, 0); }
.tm-heat { position: absolute; top: 0; left: 0; z-index: 1; width: var(--side); aspect-ratio: var(--ratio); opacity: 0;
    pointer-events: none; }
.tm-row:has(:checked) .tm-heat { opacity: .7; }
.tm-rows:has(.tm-row:hover .tm-heat) .tm-row:not(:hover) .tm-heat { opacity: 0; }
.tm-rows .tm-row:hover .tm-heat { opacity: .7; }
.tm-note { margin: .5rem 0 0; opacity: .8; }
.tm-problem { padding: 1rem; border: 1px solid #c00; border-radius: .5rem; }
"""
ON_LOAD = """
element.setAttribute('aria-live', 'polite');
watch('value', () => {  // gradio patches the elements of the result before, which keep what was chosen
    element.querySelectorAll('input[checked]').forEach(input => { input.checked = true; });
    element.querySelectorAll('.tm-rows').forEach(rows => { rows.scrollTop = 0; });
});
"""


class ImageFile(gr.Image):
    """gr.Image that hands on the file as it came, so that it is the runtime that says what is wrong with it."""
    is_template = True  # shown as gr.Image is

    def preprocess(self, payload: Any) -> Optional[str]:
        return payload.path if payload else None


def list_examples() -> List[str]:
    files = sorted((HERE / 'examples').glob('*'))
    return [str(path) for path in files if path.suffix.lower() in runtime.IMAGE_SUFFIXES]


def load_models() -> Dict[str, runtime.Runner]:
    """Those of the variable MODELS, else of models/, by name; those with template matching first.

    Raises:
        runtime.RuntimeInputError: If one cannot be loaded, or there is none.
    """
    repositories = [name.strip() for name in os.environ.get('MODELS', '').split(',') if name.strip()]
    sources: Sequence[Union[str, Path]] = repositories or sorted((HERE / 'models').glob('*.onnx'), key=lambda p: p.stem)
    if not sources:
        raise runtime.RuntimeInputError('There are no models: put ONNX files into models/, or set MODELS.')
    short = [Path(source).name.removesuffix('.onnx') for source in sources]
    names = short if len(set(short)) == len(short) else [str(source) for source in sources]  # two users' rn26_tm
    threads = int(os.environ.get('CPU_CORES') or 0) or None  # that a Space may use; the runtime cannot see a quota
    runners = {name: runtime.load(source, 'cpu', threads=threads) for name, source in zip(names, sources)}
    if repositories:
        return runners
    return dict(sorted(runners.items(), key=lambda item: find_method(item[1]) != 'match'))


def find_method(runner: runtime.Runner) -> Optional[str]:
    """What the patch scores of a model are: 'match', 'cam' for class activation maps, or None if it has none."""
    outputs = runner.metadata['outputs']
    return outputs[1].get('method', 'match') if len(outputs) > 1 else None


def classify(image: Optional[str], model: str) -> Dict[str, float]:
    """Probability of each class, for programs.

    Args:
        image: Path of an image file.
        model: Name of a model.
    """
    if not image:
        raise gr.Error('Give an image.')
    try:
        prediction = MODELS[model](image)
    except runtime.RuntimeInputError as e:
        raise gr.Error(_tell(e, image)) from e
    return {name: round(float(p), 6) for name, p in zip(prediction.class_names, prediction.probabilities)}


def show(image: Optional[str], model: str, baseline: str) -> str:
    """The result of one model or of two, as HTML."""
    if not image:
        return '<p class="tm-note">Drop an image, or choose one of the examples.</p>'
    names = [model] if baseline in (NOTHING, model) else [model, baseline]
    try:
        return ''.join(to_html(name, MODELS[name](image), find_method(MODELS[name])) for name in names)
    except runtime.RuntimeInputError as e:
        return f'<p class="tm-problem" role="alert">{escape(_tell(e, image))}</p>'


def _tell(error: Exception, image: str) -> str:
    """What is wrong with an image, without the place it was stored at."""
    return str(error).replace(image, Path(image).name)


def to_html(title: str, prediction: runtime.Prediction, method: Optional[str]) -> str:
    """The image as the network saw it, its classes, and for each a map of the regions, by what `find_method` says."""
    patches = prediction.patch_probabilities  # (templates, H, W) or None
    group = uuid4().hex
    width, height = prediction.image.size
    classes, templates = list(prediction.class_names), list(prediction.template_names)
    seen = f'<img alt="The image as the network saw it" src="{_to_url(prediction.image)}">'
    if patches is None:
        rows = _rows(group, title, classes, prediction.probabilities)
        note = 'This file has no patch scores: it cannot say which region matched what.'
        return _SECTION.format(
            kind='', title=escape(title), ratio=f'{width} / {height}', seen=seen, grid='', rows=rows, note=note)
    best = patches.argmax(axis=0)
    count = f'{best.size} regions of {round(width / best.shape[1])} pixels a side'
    if templates == classes:
        rows = _rows(group, title, classes, prediction.probabilities, prediction, told=_TOLD[method or 'match'])
    else:  # templates of their own, which have no class probability
        rows = _rows(group, title, classes, prediction.probabilities)
        rows += _rows(group, title, templates, patches.mean(axis=(1, 2)), prediction, heads=('template', 'match'))
    cells = ''.join(
        f'<i tabindex="-1" title="{escape(templates[k])} {100 * patches[k, y, x]:.0f} %"></i>'  # a tap focuses it
        for (y, x), k in np.ndenumerate(best))
    matched = '; '.join(', '.join(templates[k] for k in row) for row in best)
    grid = (
        f'<div class="tm-grid" role="img" aria-label="Best match of each region, row by row: {escape(matched)}" '
        f'style="grid-template-columns: repeat({best.shape[1]}, 1fr)">{cells}</div>')
    if method == 'cam':
        value = 'probability' if prediction.activations is None else 'score, as a share of the highest of any class,'
        note = (f'Class activation map, no template matching. Gold: the {value} that the classifier gives each '
                f'position of the last feature map, {count}. Point at or tap the image for the class of each region.')
    else:
        note = (f'Gold: how well each of {count} matched the class. Point at or tap the image for what each region '
                f'matched best.')
    return _SECTION.format(
        kind=' tm-mapped', title=escape(title), ratio=f'{width} / {height}', seen=seen, grid=grid, rows=rows, note=note)


_TOLD = {'match': 'Where {} was matched', 'cam': 'Class activation of {}'}
_SECTION = (
    '<section class="tm-result{kind}"><h2>{title}</h2>'
    '<div class="tm-view" style="--ratio: {ratio}"><div class="tm-seen">{seen}</div>{grid}{rows}</div>'
    '<p class="tm-note">{note}</p></section>')


def _rows(
        group: str,
        title: str,
        names: List[str],
        values: np.ndarray,
        shown: Optional[runtime.Prediction] = None,
        heads: Tuple[str, str] = ('class', 'probability'),
        told: str = _TOLD['match'],
) -> str:
    """Names with their values, the largest first, and what shows where each was matched."""
    patches = None if shown is None else shown.patch_probabilities
    counts = None if patches is None else np.bincount(patches.argmax(axis=0).ravel(), minlength=len(names))
    rows = [
        f'<div class="tm-row tm-head"><span></span><span class="tm-name">{heads[0]}</span><span></span>'
        f'<span>{heads[1]}</span><span>{"" if patches is None else "regions"}</span></div>']
    for place, i in enumerate(np.argsort(-values)):
        tag, switch, regions, heat = 'div', '<span></span>', '', ''
        if shown is not None and counts is not None:
            tag = 'label'
            switch = f'<input type="radio" name="{group}" value="{escape(names[i])}"{" checked" if not place else ""}>'
            regions = str(counts[i])
            alt = told.format(escape(names[i]))
            heat = f'<img class="tm-heat" alt="{alt}" src="{_heat(shown.evidence(i))}">'
        rows.append(
            f'<{tag} class="tm-row">{switch}<span class="tm-name">{escape(names[i])}</span>'
            f'<div class="tm-bar"><b style="width: {100 * values[i]:.1f}%"></b></div>'
            f'<span>{100 * values[i]:.1f} %</span><span>{regions}</span>{heat}</{tag}>')
    label = f'{escape(title)}: {heads[0]}'
    return f'<fieldset class="tm-rows" aria-live="off" aria-label="{label}">{"".join(rows)}</fieldset>'


def _heat(scores: np.ndarray) -> str:
    """Scores (H, W) of one class as gold of that opacity; the browser enlarges it."""
    pixels = np.empty((*scores.shape, 4), dtype=np.uint8)
    pixels[..., :3] = GOLD
    pixels[..., 3] = np.round(255 * scores.clip(0, 1))
    return _to_url(Image.fromarray(pixels))


def _to_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


try:
    MODELS = load_models()
except runtime.RuntimeInputError as error:
    raise SystemExit(str(error)) from None


def build() -> gr.Blocks:
    """The page."""
    names = list(MODELS)
    baselines = [*names[1:], NOTHING]
    if not os.environ.get('MODELS'):  # whose second is what the first is compared with
        baselines = [name for name in names[1:] if find_method(MODELS[name]) != 'match'] or baselines
    with gr.Blocks(title='Which class did each region match?', delete_cache=(3600, 3600)) as page:  # of uploads, in s
        gr.Markdown(
            '# Which class did each region match?\n'
            'Networks with a [template matching block](https://arxiv.org/abs/2210.00992) answer this in one forward '
            'pass. Drop an image, then point at a class or choose it. Images are deleted within two hours.')
        with gr.Row():
            with gr.Column(min_width=280):
                image = ImageFile(type='filepath', label='Image', height=280, sources=['upload', 'clipboard', 'webcam'])
                model = gr.Dropdown(names, value=names[0], label='Model')
                baseline = gr.Dropdown([NOTHING, *names], value=baselines[0], label='Compare with')
            with gr.Column(min_width=280, scale=2):
                result = gr.HTML(
                    show(None, names[0], NOTHING), css_template=CSS, apply_default_css=False, js_on_load=ON_LOAD)
        gr.Examples(list_examples(), image, label='Examples')
        changes = [image.change, model.change, baseline.change]
        gr.on(changes, show, [image, model, baseline], result, api_visibility='private')
        program = gr.Button(visible=False)
        program.click(classify, [image, model], gr.JSON(visible=False), api_name='classify')
    return page


if __name__ == '__main__':
    build().launch(max_file_size='20mb')

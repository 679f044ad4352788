"""The world: what is drawn is what was told, and the detectors see exactly that."""

from dataclasses import replace

import numpy as np
import pytest

from rolling_diffusion.world.caption import PLACE_WORDS, SYNONYMS, caption, split, typed, vocabulary
from rolling_diffusion.world.detect import detect
from rolling_diffusion.world.render import render
from rolling_diffusion.world.scene import (
    COLOURS,
    HELD_OUT,
    KINDS,
    MARGIN,
    RELATIONS,
    Border,
    Scene,
    Thing,
    arrange,
    is_at,
    is_related,
    places_along,
    random_scene,
)
from rolling_diffusion.world.score import (
    APART,
    TASKS,
    Prompt,
    difference,
    illustrate,
    interval,
    judge,
    make_prompt,
    make_prompts,
    more_invented,
    summary,
)
from rolling_diffusion.world.strip import STEPS, follow, judge_strip, strip_prompts


def test_renderers_own_pictures_score_at_least_99_percent():
    rng = np.random.default_rng(11)
    verdicts = []
    for prompt in make_prompts(270, seed=5, tasks=(*TASKS, *APART)):
        verdicts.append(judge(prompt, illustrate(prompt, rng)))
    result = summary(verdicts)
    assert result["score"] >= 0.99
    assert all(share >= 0.96 for share in result["tasks"].values()), result["tasks"]
    assert result["invented"] == 0


@pytest.mark.parametrize("size", [(128, 128), (192, 192), (256, 768), (640, 256)])
def test_every_object_is_found_at_any_size(size):
    rng = np.random.default_rng(2)
    for _ in range(25):
        scene = random_scene(rng, *size)
        picture = render(scene)
        assert picture.shape == (size[1], size[0], 3)
        seen = sorted((str(f.kind), f.colour) for f in detect(picture))
        assert seen == sorted((t.kind, t.colour) for t in scene.things)


def test_objects_keep_their_size_on_larger_canvases():
    areas = [
        (render(Scene(w, w, "day", "snow", (Thing("ball", "red", w / 2, w / 2, 26),))) == COLOURS["red"]).all(-1).sum()
        for w in (128, 512)
    ]
    assert areas[0] == areas[1] > 1000


def test_a_scene_is_the_same_for_the_same_seed():
    one, two = (render(random_scene(np.random.default_rng(4))) for _ in range(2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, render(random_scene(np.random.default_rng(5))))


def test_training_never_shows_a_held_out_pair_and_every_other():
    rng = np.random.default_rng(0)
    shown = {(t.kind, t.colour) for _ in range(2000) for t in random_scene(rng).things}
    assert not shown & HELD_OUT
    assert len(shown) == len(KINDS) * len(COLOURS) - len(HELD_OUT)


def test_captions_say_what_the_scene_shows():
    rng = np.random.default_rng(1)
    known = set(vocabulary())
    for _ in range(500):
        scene = random_scene(rng)
        told = caption(scene, rng)
        assert set(told.words) <= known and len(told.words) <= 30
        assert split(told.text) == list(told.words)
        for thing in scene.things:
            assert any(w in (thing.kind, thing.kind + "s") for w in told.words)
            if thing.place:
                assert any(p in told.text for p in PLACE_WORDS[thing.place])


def test_the_colour_that_is_told_is_the_things_own():
    rng = np.random.default_rng(3)
    names = list(COLOURS)
    for _ in range(300):
        scene = random_scene(rng)
        for word, tag in zip((told := caption(scene, rng)).words, told.tags):
            if word in COLOURS and tag.thing:  # "over green hills" tells of no thing
                assert names[tag.colour - 1] == word
                thing = scene.things[tag.thing - 1]
                assert thing.colour == word and KINDS[tag.kind - 1] == thing.kind


@pytest.mark.parametrize("task", [*TASKS, *APART])
def test_a_picture_of_something_else_is_judged_wrong(task):
    rng = np.random.default_rng(6)
    prompt = make_prompt(task, rng)
    picture = illustrate(prompt, rng)
    assert judge(prompt, picture).right
    assert not judge(prompt, render(Scene(256, 256, "day", "sand", ()))).right
    swap = {k: KINDS[(i + 1) % len(KINDS)] for i, k in enumerate(KINDS)}
    other = replace(prompt, wanted=tuple(replace(t, kind=swap[t.kind]) for t in prompt.wanted))
    assert not judge(other, picture).right


def test_swapped_colours_and_surplus_objects_are_noticed():
    rng = np.random.default_rng(8)
    prompt = make_prompt("colour binding", rng)
    a, b = prompt.wanted
    swapped = replace(prompt, wanted=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
    assert not judge(prompt, illustrate(swapped, rng)).right
    more = replace(prompt, wanted=(a, b, Thing("ball", "red")))
    verdict = judge(prompt, illustrate(more, rng))
    assert verdict.found == 3 and verdict.invented == 1


@pytest.mark.parametrize("size", [128, 192, 256, 384, 512, 768])
def test_places_are_even_and_far_enough_apart(size):
    places = places_along(size)
    assert all(b - a >= 64 for a, b in zip(places, places[1:]))
    assert places[0] >= MARGIN and size - places[-1] >= MARGIN
    assert {t.x for _ in range(60) for t in random_scene(np.random.default_rng(_), size, 256).things} >= set(places)


@pytest.mark.parametrize("size, down", [((256, 256), False), ((512, 128), False), ((128, 512), True)])
def test_things_without_a_place_stand_in_line_in_the_order_told(size, down):
    rng = np.random.default_rng(0)
    things = (Thing("ball", "red"), Thing("star", "blue"), Thing("tree", "green"))
    scene = arrange(Scene(*size, "day", "snow", things), rng)
    assert scene is not None
    along, across = zip(*((t.y, t.x) if down else (t.x, t.y) for t in scene.things))
    assert list(along) == sorted(along) and len(set(across)) == 1


@pytest.mark.parametrize("relation", RELATIONS)
def test_related_things_stand_as_the_relation_says(relation):
    rng = np.random.default_rng(0)
    scene = arrange(Scene(256, 256, "day", "snow", (Thing("ball", "red"), Thing("star", "blue")), relation), rng)
    assert scene is not None
    a, b = ((t.x, t.y) for t in scene.things)
    assert is_related(relation, a, b)
    assert [r for r in RELATIONS if is_related(r, a, b)] == [relation]


def test_a_canvas_too_small_for_any_scene_is_named():
    with pytest.raises(ValueError, match="64 × 128 pixels has no room"):
        random_scene(np.random.default_rng(0), 64, 128)


def test_places_and_relations():
    assert is_at("left", 60, 200, 256, 256) and not is_at("left", 140, 200, 256, 256)
    assert is_at("centre", 128, 128, 256, 256) and not is_at("centre", 60, 128, 256, 256)
    assert is_related("above", (50, 20), (60, 200)) and not is_related("left of", (50, 20), (60, 200))
    assert MARGIN > 28


def test_intervals_hold_their_shares():
    assert interval(10, 10)[1] == 1.0 and 0.6 < interval(10, 10)[0] < 0.8
    low, high = interval(45, 50)
    assert low < 0.9 < high
    rng = np.random.default_rng(0)
    prompts = make_prompts(12, 3)
    right = [judge(p, illustrate(p, rng)) for p in prompts]
    wrong = [judge(p, render(Scene(256, 256, "day", "sand", ()))) for p in prompts]
    mean, low, high = difference(right, wrong)
    assert mean == low == high == 1.0
    extra = [replace(v, found=v.found + 1, invented=v.invented + 1) for v in right]  # one more object in each picture
    mean, low, high = more_invented(extra, right)
    assert mean == pytest.approx(len(right) / sum(v.found for v in extra)) and 0 < low <= mean <= high < 1


def test_prompts_are_the_same_for_the_same_seed():
    assert make_prompts(12, 9) == make_prompts(12, 9) != make_prompts(12, 10)


@pytest.mark.parametrize("side", STEPS)
def test_a_strip_is_one_world(side):
    rng = np.random.default_rng(3)
    scenes = [replace(random_scene(rng), x0=16 * int(rng.integers(75)))]
    while len(scenes) < 12:
        scenes.append(follow(rng, scenes[-1], side, change=rng.random() < 0.3))
    pictures = [render(scene) for scene in scenes]
    for a, b in zip(scenes, scenes[1:]):
        assert b.border == Border(side, a.time, a.ground) and (a.hill, a.width) == (b.hill, b.width)
    assert len({(s.time, s.ground) for s in scenes}) > 1
    named = [Prompt("two objects", "", s.things, colours=True) for s in scenes]
    verdicts, seams = judge_strip(named, pictures, side)
    assert all(v.right and v.invented == 0 for v in verdicts)
    assert seams.repeats == 0 and max(seams.slips) <= 4 and max(seams.steps) < 1.5
    # Pictures of other places in the world do not fit.
    strange = [replace(s, x0=int(rng.integers(300)), y0=0, border=None) for s in scenes]
    seams = judge_strip(named, [render(s) for s in strange], side)[1]
    assert np.mean(seams.steps) > 2
    assert max(seams.slips) > 4 or side in ("top", "bottom")  # sky and ground cannot be moved to meet


def test_a_strip_of_one_scene_is_that_scene():
    scene = random_scene(np.random.default_rng(0))
    wide = np.concatenate([render(replace(scene, things=(), x0=x)) for x in (0, 256, 512)], 1)
    assert np.array_equal(wide, render(replace(scene, things=(), width=768)))
    # The hills come again after a period, and what a picture comes out of does not change what it is.
    assert np.array_equal(render(replace(scene, x0=300)), render(scene))
    assert np.array_equal(render(replace(scene, border=Border("left", scene.time, scene.ground))), render(scene))


@pytest.mark.parametrize("side", STEPS)
def test_another_hour_comes_softly_and_is_always_told(side):
    rng = np.random.default_rng(2)
    last = replace(random_scene(rng), things=())
    for _ in range(20):
        scene = follow(rng, last, side, change=True)
        told = caption(scene, rng, setting_rate=0.0)
        assert (told.time > 0, told.ground > 0) == (scene.time != last.time, scene.ground != last.ground)
        assert told.time or told.ground
        there, own = (render(replace(scene, things=(), border=b)).astype(int) for b in (scene.border, None))
        difference = np.abs(there - own).max(-1)
        difference = difference.max(0) if side in ("left", "right") else difference.max(1)
        difference = difference if side in ("left", "top") else difference[::-1]
        if (side, scene.time) != ("bottom", last.time):  # there is nothing but sky, and it is the same
            assert difference[:20].min() > 8
        assert difference[130:].max() == 0
        assert np.abs(np.diff(difference)).max() < 12


def test_what_is_cut_or_drawn_twice_at_a_border_is_counted():
    rng = np.random.default_rng(1)
    one, two = Thing("ball", "red", 64, 64), Thing("star", "blue", 64, 192)
    scene = Scene(256, 256, "day", "snow", (one,))
    after = replace(scene, x0=256, things=(two,))
    prompts = [Prompt("colours", "", (t,), colours=True) for t in (one, two)]

    def seams(*scenes):
        return judge_strip(prompts, [render(s) for s in scenes], "left")[1]

    assert seams(scene, after).repeats == 0
    doubled = seams(scene, replace(after, things=(two, replace(one, x=128))))
    assert (doubled.cut, doubled.doubled) == (0, 1)
    cut = seams(replace(scene, things=(replace(one, x=256),)), replace(after, things=(two, replace(one, x=0))))
    assert cut.cut == 1
    assert strip_prompts(rng, 3, TASKS)[2].task == TASKS[2]


def test_synonyms_say_the_same():
    known, rng, said = set(vocabulary()), np.random.default_rng(1), set()
    assert set(SYNONYMS.values()) <= known and not set(SYNONYMS) & known
    for _ in range(1500):
        told = caption(random_scene(rng), rng)
        again = typed(told, rng)
        assert [SYNONYMS.get(w, w) for w in again.words] == list(told.words) and again.tags == told.tags
        said |= set(again.words)
    assert len(set(SYNONYMS) - said) <= 3

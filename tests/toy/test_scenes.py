from engine.toy import judge, scenes


def test_the_judge_reads_every_attribute_of_rendered_clips():
    drawn = scenes.draw_scenes(150, 0, held_out=False, jitter=True)
    drawn += scenes.draw_scenes(100, 1, held_out=True)
    wrong = []
    for scene, frames in zip(drawn, scenes.render(drawn), strict=True):
        truth = {a: getattr(scene, a) for a in scenes.ATTRIBUTES}
        if judge.read_pixels(frames) != truth or judge.read_caption(scene.caption) != truth:
            wrong.append((truth, judge.read_pixels(frames), judge.read_caption(scene.caption)))
    assert not wrong, wrong[:3]


def test_the_judge_refuses_an_empty_clip():
    frames = scenes.render(scenes.draw_scenes(1, 0, held_out=False))[0] * 0 + 125
    assert set(judge.read_pixels(frames).values()) == {None}


def test_the_judge_refuses_a_clip_whose_shape_fades_away():
    """Its last frames hold only a faint rest, which has no centre."""
    scene = scenes.draw_scenes(1, 0, held_out=False)[0]
    frames = scenes.render([scene])[0].astype(float)
    backdrop = frames[:, :1, :1]
    frames[4:] = backdrop[4:] + 0.3 * (frames[4:] - backdrop[4:])
    assert set(judge.read_pixels(frames).values()) == {None}


def test_a_prompt_states_what_it_should_and_no_more():
    for scene in scenes.draw_scenes(40, 3, held_out=False):
        read = judge.read_caption(scene.prompt)
        assert {k: v for k, v in read.items() if v} == {
            a: getattr(scene, a) for a in scenes.IN_PROMPT
        }


def test_one_triple_in_six_is_held_out_and_never_drawn_for_training():
    train = {(s.colour, s.shape, s.motion) for s in scenes.draw_scenes(4000, 0, held_out=False)}
    held = {(s.colour, s.shape, s.motion) for s in scenes.draw_scenes(1000, 0, held_out=True)}
    assert (len(train), len(held)) == (100, 20) and not train & held


def test_scenes_are_a_function_of_the_seed():
    assert scenes.draw_scenes(20, 5, held_out=False) == scenes.draw_scenes(20, 5, held_out=False)
    assert scenes.draw_scenes(20, 5, held_out=False) != scenes.draw_scenes(20, 6, held_out=False)

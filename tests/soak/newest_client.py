"""All calls of the openai package that a server answers: `python newest_client.py JSON`.

Prints what it did and the video as the package read it; an exception is a fault.
"""

import json
import sys
import warnings
from contextlib import contextmanager

import openai

warnings.simplefilter("ignore", DeprecationWarning)  # of client.videos
CALLS: list[str] = []


@contextmanager
def call(name: str):
    yield
    CALLS.append(name)


def check(right: bool, what: str) -> None:
    if not right:
        raise RuntimeError(what)


def chat(client: openai.OpenAI, model: str, url: str, **fields):
    part = {"type": "video_url", "video_url": {"url": url}}
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": [part]}], seed=1, **fields
    )


def captions(client: openai.OpenAI, model: str, id: str, clip: str) -> None:
    """The same caption of the video, of an upload of it, and as a stream."""
    with call("files.create"):
        file = client.files.create(file=open(clip, "rb"), purpose="vision")
    with call("chat.completions.create"):
        said = [chat(client, model, url).choices[0].message.content for url in (id, file.id)]
        check(said[0] == said[1], f"captions of one video: {said}")
    with call("chat.completions.create, stream"):
        parts = [
            part.choices[0].delta.content or "" for part in chat(client, model, id, stream=True)
        ]
        check("".join(parts) == said[0], f"{parts} are not {said[0]!r}")
    with call("files.delete"):
        check(client.files.delete(file.id).deleted, "the upload is there still")


def main() -> None:
    given = json.loads(sys.argv[1])
    asked, clip = given["asked"], given["clip"]
    client = openai.OpenAI(base_url=given["url"], api_key="none")
    with call("models.list"):
        model = client.models.list().data[0].id

    own = {name: asked[name] for name in ("seed", "mode", "num_inference_steps", "guidance_scale")}
    common = {name: asked[name] for name in ("prompt", "size", "seconds")}
    with call("videos.create_and_poll"):
        video = client.videos.create_and_poll(**common, model=model, extra_body=own)
    with call("videos.retrieve"):
        check(client.videos.retrieve(video.id) == video, "retrieve says something else")
    with call("videos.list"):
        other = client.videos.create(**common, model=model, extra_body=own)
        ids = [one.id for one in client.videos.list(limit=1)]  # page after page
        check(ids[:2] == [other.id, video.id], f"the list is {ids}")
    with call("videos.download_content"):
        client.videos.download_content(video.id).write_to_file(clip)

    captions(client, model, video.id, clip)
    with call("videos.delete"):
        check(client.videos.delete(other.id).deleted, "the video is there still")
        client.videos.delete(video.id)
        check(client.videos.list().data == [], "the list is not empty")
    print(json.dumps({"openai": openai.__version__, "calls": CALLS, "video": video.to_dict()}))


if __name__ == "__main__":
    main()

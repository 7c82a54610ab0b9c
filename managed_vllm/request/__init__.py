"""One request, from what the caller wrote to what is returned. Imports nothing of the servers' side.

In the order in which a request passes through them:

- `methods`, `async_methods`: the signatures; `arguments`: their types.
- `prompts`, `messages`, `images`: prompts, conversations and pictures, as callers write them.
- `sampling`, `fields`: sampling parameters and other request fields.
- `batches`, `calls`: the requests of one call.
- `pending`, `resume`, `streamed`: one request, and one generation across losses; no I/O.
- `attempts`: sends it until it is answered, with `concurrency`, `endpoints`, `retry`, `bounds`, `event_loops`.
- `bodies`, `server_images`, `connections`: what goes over the wire, and by which connection.
- `responses`, `http_errors`, `outputs`: what comes back.
- `portal`, `openai_sdk`: for callers without an event loop, and for the OpenAI SDK.
"""

"""A stand-in for an inference server: the standard library around transformers' `generate`, in
bfloat16. It answers the two requests that docs/edits/engine.patch makes."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM


class StandIn(ThreadingHTTPServer):
    """Serves in a thread. fault: what it does wrong from its next request on: "", "fails", "sleeps",
    or "half", which leaves out half of the responses."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault = ""
        self.requests = []
        self.lock = threading.Lock()  # of the model, and of torch's random numbers
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def load(self, request):
        path = request["model_path"]
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        return {"success": True}

    @torch.no_grad()
    def complete(self, request):
        self.requests.append(request)
        prompt, stop = request["prompt"], request["stop_token_ids"]
        torch.manual_seed(request["seed"])
        found = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=request["temperature"] > 0,
            temperature=request["temperature"] or 1.0,
            top_k=0,
            num_return_sequences=request["n"],
            max_new_tokens=request["max_tokens"],
            eos_token_id=stop,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        logp = torch.stack(found.scores, 1).float().log_softmax(-1)  # (n, N, V)
        choices = []
        for ids, rows in zip(found.sequences[:, len(prompt) :].tolist(), logp):
            ends = [n for n, token in enumerate(ids) if token in stop]
            ids = ids[: ends[0] + 1] if ends else ids
            logprobs = [row[token].item() for row, token in zip(rows, ids)]
            reason = "stop" if ends else "length"
            choice = {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
            choices.append({**choice, "finish_reason": reason})
        return {"choices": choices[: len(choices) // 2] if self.fault == "half" else choices}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.fault == "sleeps":
            time.sleep(5)
        if self.server.fault == "fails":
            self.send_error(500)
            return
        work = {
            "/update_weights_from_disk": self.server.load,
            "/v1/completions": self.server.complete,
        }[self.path]
        with self.server.lock:
            answer = json.dumps(work(request)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass

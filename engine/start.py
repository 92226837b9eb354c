"""What a run needs to know of the machine before it starts."""

from dataclasses import replace

from engine.choose import Forms, choose
from engine.memory import Memory, enable_gradient_checkpointing
from lib.checks import check_prompts
from lib.estimate import PROGRAM, device_memory, memory_table
from lib.prompts import TEMPLATE_COLUMNS
from lib.report import describe_run
from lib.texts import describe_prompt
from policy import stop_ids
from tasks import longest_prompts, prompt_ids


def prepare(policy, tokenizer, task, measured, config, state) -> tuple[Forms, Memory]:
    """Says what the run is about to do and what memory it takes, and picks fast or plain forms.

    state: what the run remembers, among it the sizes that were halved
    """
    problems = task.train + task.validation[: config.eval_problems]
    prompts = longest_prompts(task, problems, tokenizer)
    check_prompts(policy, prompts, config.max_new_tokens)
    stop = stop_ids(policy, tokenizer, config.stop)
    ends = tokenizer.convert_ids_to_tokens(stop)
    print(describe_run(config, policy, task, measured.texts, ends), end="")
    problem = task.train[0]
    first = prompt_ids(task, problem, tokenizer)
    print(describe_prompt(tokenizer, first, problem.answer), end="")
    for name in TEMPLATE_COLUMNS & problem.columns.keys():
        columns = {**problem.columns, name: None}
        without = prompt_ids(task, replace(problem, columns=columns), tokenizer)
        if problem.columns[name] and first == without:
            print(f'warning: the chat template ignores the "{name}" of this prompt')
    unknown = tokenizer.unk_token_id
    if unknown is not None and any(unknown in ids for ids in prompts):
        print(
            "warning: the tokenizer does not know some characters of the prompts, and writes "
            f"{tokenizer.unk_token} for each"
        )
    available = device_memory(policy.device)
    program = PROGRAM if policy.device.type == "cpu" else 0
    print(memory_table(config, policy, available, len(prompts[0]), program), end="")
    if config.gradient_checkpointing:  # not before: the estimate counts what it would recompute
        enable_gradient_checkpointing(policy)
    forms = choose(policy, prompts, stop, config.sampling, config.max_new_tokens, config.fast)
    memory = Memory(
        state["halved"],
        rows_at_once=config.rows_at_once or config.prompts_per_step * config.group_size,
        micro_batch_tokens=config.micro_batch_tokens,
    )
    return forms, memory

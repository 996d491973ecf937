"""How do I train, tune and use a language model whose layers are on several devices?

A Llama learns from Python's reference manual, is tuned to describe functions with LoRA, saved as a preset, loaded into
another mesh, and generates the words that it would on one device.
"""

import json
import pydoc
import pydoc_data.topics
import sys
import tempfile

import keras
from keras_hub import models
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

import tfpar
from tfpar import Mesh
from tfpar.testing import logical_cpus

WORDS, TOKENS = 1000, 48
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MODULES = "ast datetime itertools json math os random re shutil statistics string textwrap threading"
PROMPTS = ["math.floor: ", "os.rename: ", "random.choice: ", "threading.Lock: ", "re.split: "]


def manual():
    """Paragraphs of Python's reference manual, which is on every machine that has Python."""
    texts = "\n\n".join(pydoc_data.topics.topics.values()).split("\n\n")
    return [" ".join(text.split()) for text in texts if len(text) > 80]


def descriptions():
    """`name: what it does`, for functions and classes of Python's library."""
    found = []
    for name in MODULES.split():
        module = pydoc.safeimport(name)
        for part in dir(module):
            summary = pydoc.splitdoc(pydoc.getdoc(getattr(module, part)))[0]
            if not part.startswith("_") and summary:
                found.append(f"{name}.{part}: {summary}")
    return sorted(found)


def tokenizer(texts):
    """A byte-pair tokenizer for these texts."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    options = dict(special_tokens=SPECIAL, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator(texts, BpeTrainer(vocab_size=WORDS, **options))
    found = json.loads(trained.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in found["merges"]]
    return models.Llama3Tokenizer(vocabulary=found["vocab"], merges=merges)


def main(batches=70):
    logical_cpus(4)
    keras.utils.set_random_seed(0)
    to_learn, to_tune = manual(), descriptions()
    preprocessor = models.Llama3CausalLMPreprocessor(tokenizer(to_learn + to_tune), sequence_length=TOKENS)

    strategy = tfpar.MeshStrategy(Mesh(data=2, tensor=2))
    with strategy.scope():
        backbone = models.Llama3Backbone(
            vocabulary_size=WORDS, num_layers=3, num_query_heads=4, num_key_value_heads=2, hidden_dim=128,
            intermediate_dim=256, rope_max_wavelength=10_000,
        )  # fmt: skip
        model = models.Llama3CausalLM(backbone=backbone, preprocessor=preprocessor)
        model.compile(keras.optimizers.Adam(4e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    print(f"{len(to_learn)} paragraphs, on {strategy.mesh}")
    model.fit(to_learn[: 32 * batches], batch_size=32, epochs=1, verbose=2)

    with strategy.scope():
        backbone.enable_lora(rank=8)
        model.compile(keras.optimizers.Adam(5e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    weights, trained = (sum(w.shape.num_elements() for w in ws) for ws in (model.weights, model.trainable_weights))
    print(f"{len(to_tune)} descriptions; LoRA trains {trained:,} of {weights:,} weights")
    model.fit(to_tune[: 32 * batches], batch_size=32, epochs=4, verbose=2)

    with tempfile.TemporaryDirectory() as folder:
        model.save_to_preset(folder)
        found = {}
        for other in (None, tfpar.TensorParallelStrategy()):
            with other.scope() if other else keras.name_scope("one"):
                loaded = models.Llama3CausalLM.from_preset(folder)
                loaded.compile(sampler="greedy")
            found[other] = loaded.generate(PROMPTS, max_length=24)
    one, four = found.values()
    assert one == four, (one, four)
    print("\n".join(["on 4 devices, as on one:", *four]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

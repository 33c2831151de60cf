"""Keys of the settings files that Sentence Transformers 2 to 6, Transformers and PEFT write, and their effect here."""

from megatron_embed.models.dense_settings import ACTIVATION_CLASSES
from megatron_embed.models.key_table import FileTable, Key, harmless, honoured, nested, refused

_LOADING = {
    "add_pooling_layer": harmless("whether BERT's pooler is built, which embeddings do not use"),
    "attn_implementation": harmless("which kernel computes attention"),
    "cache_dir": harmless("where the hub's files are kept"),
    "device_map": harmless("on which device the model is"),
    "dtype": harmless("the dtype of the computation, which --dtype and config.json set here"),
    "low_cpu_mem_usage": harmless("how the weights are read"),
    "revision": harmless("revision of the hub's files"),
    "torch_dtype": harmless("the older name of dtype"),
    "trust_remote_code": harmless("Sentence Transformers removes it; code in a directory is never run here"),
    "unpad_inputs": harmless("how a batch is laid out in memory"),
    "use_memory_efficient_attention": harmless("which kernel computes attention"),
    "use_safetensors": harmless("how the weights are read"),
}
_TOKENIZER_LOADING = {
    "model_max_length": honoured("longest text in tokens, before max_seq_length; null is refused"),
    "padding_side": harmless("where a batch is padded; nothing is padded here"),
    "revision": harmless("revision of the hub's files"),
    "trust_remote_code": harmless("Sentence Transformers removes it; code in a directory is never run here"),
    "truncation_side": honoured("the end at which a text that is too long loses its tokens", "left", "right"),
    "use_fast": harmless("which implementation of the same tokenizer"),
}
_CONFIG_LOADING = {
    "revision": harmless("revision of the hub's files"),
    "trust_remote_code": harmless("Sentence Transformers removes it; code in a directory is never run here"),
    "use_cache": harmless("whether keys and values are kept for generation"),
}
_FORWARD = {
    "method": honoured("the model's method that is called with the tokens", "forward"),
    "method_output_name": honoured("which of its outputs is taken", "last_hidden_state", "logits"),
}
_PROCESSING = {
    "common": refused("arguments of the tokenizer's call for every kind of input", {}, {"return_tensors": "pt"}),
    "text": nested("arguments of the tokenizer's call", {
        "padding": harmless("how a batch is padded; nothing is padded here"),
        "truncation": honoured("whether a text that is too long is truncated", True, "longest_first"),
        "max_length": honoured("longest text in tokens, before every other length; null is refused"),
        "logits_to_keep": honoured("tokens whose logits are computed, from the last one on; of a sparse decoder all: "
                                   "0"),
    }),
    "chat_template": honoured("variables of the chat template, with the modality message"),
    "audio": harmless("for audio"), "image": harmless("for images"), "video": harmless("for video"),
}

SENTENCE_BERT_CONFIG = FileTable(
    file="sentence_bert_config.json",
    about="Settings of Sentence Transformers' module Transformer. Its older names, sentence_roberta_config.json and "
          "the like, are read in the same way.",
    keys={
        "max_seq_length": honoured("longest text in tokens, special tokens included; None: the tokenizer's"),
        "do_lower_case": honoured("lowercases every text, unless the tokenizer does so itself", True, False, None),
        "transformer_task": honoured("which class of Transformers holds the model", "feature-extraction",
                                     "sequence-classification", "text-generation", "fill-mask"),
        "modality_config": nested("the model's method for each kind of input", {
            "text": nested("for texts", _FORWARD),
            "message": nested("for chats: every text is put into the chat template as the user's message, and its "
                              "prompt as the system's", {
                                  **_FORWARD, "format": honoured("format of a message's content", "flat",
                                                                 "structured", "auto")}),
            **{kind: harmless("for other kinds of input than texts")
               for kind in ("image", "audio", "video", "image+text", "text+image", "audio+text", "text+audio",
                            "video+text", "text+video")},
        }),
        "module_output_name": honoured("the module's output", "token_embeddings", "scores", "causal_logits"),
        "processing_kwargs": nested("arguments of the tokenizer's call, by kind of input", _PROCESSING),
        "query_length": honoured("longest query in tokens, in place of max_seq_length"),
        "document_length": honoured("longest document in tokens, in place of max_seq_length"),
        "query_expansion": nested("of a multi-vector model: mask tokens that are appended to queries (ColBERT)", {
            "strategy": honoured("fixed: every query has this length; min: at least", "fixed", "min"),
            "length": honoured("tokens of a query"),
            "attend": honoured("whether attention sees the appended tokens", True, False),
            "token": honoured("the appended token; None: the tokenizer's mask, else its EOS"),
        }),
        "unpad_inputs": harmless("how a batch is laid out in memory"),
        "model_args": nested("arguments of loading the model", _LOADING),
        "model_kwargs": nested("the newer name of model_args", _LOADING),
        "tokenizer_args": nested("arguments of loading the tokenizer", _TOKENIZER_LOADING),
        "processor_kwargs": nested("the newer name of tokenizer_args, which stands before it", _TOKENIZER_LOADING),
        "config_args": nested("arguments of loading config.json", _CONFIG_LOADING),
        "config_kwargs": nested("the newer name of config_args", _CONFIG_LOADING),
        "tokenizer_name_or_path": refused("a tokenizer from elsewhere", remedy="copy its files into the directory, and "
                                          "remove the key"),
        "cache_dir": harmless("where the hub's files are kept"),
        "backend": harmless("Sentence Transformers replaces it by its caller's"),
    })

CONFIG_SENTENCE_TRANSFORMERS = FileTable(
    file="config_sentence_transformers.json", about="Settings of a whole model of Sentence Transformers.",
    keys={
        "__version__": harmless("versions that wrote the directory"),
        "model_type": honoured("which class of Sentence Transformers the directory is for", "SentenceTransformer",
                               "CrossEncoder", "MultiVectorEncoder", "ColBERT", "SparseEncoder", None),
        "prompts": honoured("texts before a text: query for queries, document for documents"),
        "default_prompt_name": honoured("the prompt of texts without a role"),
        "similarity_fn_name": honoured("what compares vectors; dot_product is an older name of dot; maxsim, of "
                                       "multi-vector models (PyLate: MaxSim)", "cosine", "dot", "dot_product", "maxsim",
                                       "MaxSim", None,
                                       remedy="vectors are ranked by cosine or dot product here, those of tokens by "
                                              "maxsim: write one of these, if the model may be used so"),
        "truncate_dim": refused("drops the dimensions of every vector from this one on",
                                remedy="remove the key: vectors then have all their dimensions, and evaluate "
                                       "--dims measures fewer"),
        "requirements": harmless("versions of packages that the stock library asks for"),
        "activation_fn": honoured("of a cross-encoder: the function applied to its output, before that of config.json; "
                                  "torch's Sigmoid and Identity, others are refused and none is imported"),
        "keep_in_fp32_modules": harmless("of a cross-encoder: modules that stay in float32"),
        "query_prefix": honoured("of PyLate: the token before every query"),
        "document_prefix": honoured("of PyLate: the token before every document"),
        "query_length": honoured("of PyLate: tokens of a query, mask tokens included; sentence_bert_config.json's "
                                 "query_length and query_expansion stand before it"),
        "document_length": honoured("of PyLate: longest document in tokens; sentence_bert_config.json's stands before "
                                    "it"),
        "do_query_expansion": honoured("of PyLate: whether queries get mask tokens; without the key they do if any key "
                                       "of PyLate is there", True, False, None),
        "attend_to_expansion_tokens": honoured("of PyLate: whether attention sees these", True, False, None),
        "skiplist_words": honoured("of PyLate: tokens of documents that give no vector; None: punctuation"),
    })

MODULES = FileTable(
    file="modules.json",
    about="The modules of a model, in their order: Transformer, Pooling, then any Dense and Normalize; of a reranker, "
          "Transformer, then perhaps LogitScore. Others are refused by name. A Dropout does nothing outside training. "
          "The Transformer of an embedding model may have a folder of its own (0_Transformer); what is written has "
          "none.",
    keys={
        "idx": harmless("the module's number"),
        "name": honoured("the module's name: one for each, since of two with the same name only the later is loaded"),
        "path": honoured("the module's folder"),
        "type": honoured("the module's class, of Sentence Transformers itself"),
        "kwargs": harmless("names of arguments of the caller that the module takes; none is given here"),
    })

POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken"}
"""The older spelling: flag -> pooling."""

POOLING = FileTable(
    file="1_Pooling/config.json", about="How the vectors of a text's tokens become one.",
    keys={
        "pooling_mode": honoured("the pooling: cls, mean, weightedmean or lasttoken, or cls and mean one behind the "
                                 "other; other combinations, max and mean_sqrt_len_tokens are refused"),
        **{flag: honoured(f"the older spelling of {name}; without any that is true, mean", True, False, None)
           for flag, name in POOLING_FLAGS.items()},
        "pooling_mode_max_tokens": refused("the maximum over the tokens, per dimension", False),
        "pooling_mode_mean_sqrt_len_tokens": refused("the sum over the root of the number of tokens", False),
        "include_prompt": honoured("whether the prompt's tokens are pooled too; false, or null, is refused where texts "
                                   "have a prompt, the directory's or the user's", True, False, None),
        "embedding_dimension": harmless("the number of dimensions, which config.json has too"),
        "word_embedding_dimension": harmless("the older name of embedding_dimension"),
    })

DENSE = FileTable(
    file="2_Dense/config.json", about="A linear layer over the text's vector; its weights lie in model.safetensors "
                                      "beside it. There may be several, before or behind Normalize.",
    keys={
        "in_features": honoured("numbers of the vector that it takes"),
        "out_features": honoured("numbers of the vector that it gives"),
        "bias": honoured("whether the linear layer has a bias; without the key it has", True, False),
        "activation_function": honoured("the function behind the linear layer; without the key Tanh",
                                        *ACTIVATION_CLASSES),
        "module_input_name": honoured("what it is applied to", "sentence_embedding"),
        "module_output_name": honoured("where the result goes", "sentence_embedding", None),
        "use_residual": refused("the input is added to the output", False),
    })

NORMALIZE = FileTable(
    file="2_Normalize/config.json", about="The module that scales vectors to unit length; often without a file.",
    keys={
        "module_input_name": honoured("what is scaled", "sentence_embedding"),
        "module_output_name": honoured("where it goes", "sentence_embedding", None),
    })

MULTI_VECTOR_MASK = FileTable(
    file="2_MultiVectorMask/config.json", about="Which tokens of a multi-vector model give a vector that counts.",
    keys={
        "skiplist_words": honoured("tokens that give none, by their text in the vocabulary"),
        "skiplist_tasks": honoured("roles in which they give none"),
        "keep_only_token_ids": refused("the only tokens of documents that give one", []),
    })

_TOKEN_STATES = {
    "module_input_name": honoured("what it is applied to", "token_embeddings"),
    "module_output_name": honoured("where the result goes", "token_embeddings", None)}
TOKEN_DENSE = FileTable(
    file="1_Dense/config.json of a multi-vector model", about="A linear layer over the state of every token.",
    keys={**DENSE.keys, **_TOKEN_STATES, "module_input_name": honoured(
        "what it is applied to; without the key the states of the tokens", "token_embeddings", None)})
TOKEN_NORMALIZE = FileTable(
    file="3_Normalize/config.json of a multi-vector model", about="The module that scales every token's vector to unit "
                                                                 "length.", keys=_TOKEN_STATES)

SPLADE_POOLING = FileTable(
    file="1_SpladePooling/config.json", about="How a sparse model's logits become one weight for each token of the "
                                              "vocabulary.",
    keys={
        "pooling_strategy": honoured("the logit of a text: the largest of its tokens'", "max"),
        "activation_function": honoured("applied to it, then log(1 + x)", "relu"),
        "embedding_dimension": harmless("the vocabulary's size"),
        "word_embedding_dimension": harmless("the older name of embedding_dimension"),
        "chunk_size": harmless("tokens whose logits are computed at once"),
    })

TOKENIZER_CONFIG = FileTable(
    file="tokenizer_config.json", closed=False,
    about="Read by Transformers' AutoTokenizer, which makes the token ids here as there. Only keys that change what is "
          "done with them are listed; all others are its business.",
    keys={
        "model_max_length": honoured("longest text in tokens where sentence_bert_config.json names no length; at most "
                                     "the model's positions"),
        "truncation_side": honoured("the end at which a text that is too long loses its tokens; a training run "
                                    "truncates at the end, and writes right", "left", "right", None),
        "padding_side": harmless("where a batch is padded; nothing is padded here"),
        "add_eos_token": honoured("with last-token pooling, an EOS at the end, also where Transformers 5 no longer "
                                  "adds it; without the key none is added that the tokenizer does not add itself"),
        "chat_template": honoured("with the modality message of sentence_bert_config.json; also in "
                                  "chat_template.jinja"),
    })

CONFIG = FileTable(
    file="config.json", closed=False, remedy="take a release of the model without it",
    about="Read by the model's family. Only keys that change what Transformers computes in every family are listed; "
          "those of a family that are not computed are refused by its reader.",
    keys={
        "transformers_weights": refused("the file of the weights, in place of model.safetensors",
                                        remedy="give that file the name model.safetensors, and remove the key"),
        "per_layer_config": refused("settings of single layers", {}, []),
        "fusion_config": refused("layers that Transformers replaces by others", {}),
    })

CONFIG_BLOCK = FileTable(
    file="config.json: sentence_transformers", about="What Sentence Transformers 4 and 5 write for a cross-encoder.",
    keys={
        "activation_fn": honoured("the function applied to the model's output: torch's Sigmoid and Identity, others "
                                  "are refused and none is imported; None: Sigmoid"),
        "version": harmless("of the library that wrote it"),
    })

RERANKER_CONFIG = FileTable(
    file="config.json of a reranker", closed=False,
    about="The keys that decide how a *ForSequenceClassification or *ForCausalLM scores a pair. Without a "
          "CrossEncoder's modules.json nothing else counts but the tokenizer, whose chat template, if it has one, must "
          "take the roles query and document.",
    keys={
        "architectures": honoured("the head: a classifier, or the logits of two words"),
        "id2label": honoured("of a classifier: its outputs; there must be exactly one"),
        "num_labels": honoured("the same", 1, None),
        "pad_token_id": honoured("of a decoder's classifier: the score is read at the last token that differs from it"),
        "sbert_ce_default_activation_function": honoured("activation_fn as Sentence Transformers before 4 wrote it"),
        "problem_type": harmless("which loss Transformers takes"),
        "classifier_dropout": harmless("of training"),
        "use_sep_token": harmless("of vLLM"),
    })

LOGIT_SCORE = FileTable(
    file="1_LogitScore/config.json", about="Of a cross-encoder that is a causal language model: the answers whose "
                                           "logits, one less the other, are the score.",
    keys={
        "true_token_id": honoured("the token of yes"),
        "false_token_id": honoured("the token of no; None, for the logit of yes alone, is refused"),
        "module_input_name": honoured("where the logits come from", "causal_logits", None),
    })

_INITIALIZATIONS: tuple[object, ...] = (True, False, "gaussian", "eva", "orthogonal", "mica", None)
"""Initializations that leave the base's weights unchanged, so that a trained adapter means the same after each."""

ADAPTER_CONFIG = FileTable(
    file="adapter_config.json", about="PEFT's settings of an adapter. Supported is LORA on linear layers.",
    unset=(None, False, "none", [], {}), remedy="merge the adapter with PEFT's merge_and_unload, and give the merged "
                                                "model",
    keys={
        "peft_type": honoured("the method", "LORA"),
        "r": honoured("rank of the adapter"),
        "lora_alpha": honoured("scales the adapter's output by lora_alpha / r"),
        "use_rslora": honoured("scales by lora_alpha / sqrt(r) instead", True, False, None),
        "base_model_name_or_path": honoured("the model that the adapter belongs to"),
        "target_modules": honoured("the adapted modules: endings of names, a regular expression, or all-linear; "
                                   "tensors of others, which PEFT leaves out, are refused"),
        "exclude_modules": honoured("modules without an adapter all the same; their tensors are refused"),
        "modules_to_save": honoured("modules trained whole: a reranker's classifier; others are refused by their "
                                    "tensors, and so are the adapters' tensors of these"),
        "init_lora_weights": honoured(
            "the adapter's initialization; under pissa, olora, corda, loftq and lora_ga the base's weights were "
            "changed with it, and PEFT changes them again when it loads the adapter, or cannot", *_INITIALIZATIONS,
            remedy="load it with PEFT once and write it again, with save_pretrained(..., "
                   "path_initial_model_for_weight_conversion=...) as an adapter of the unchanged base, or with "
                   "merge_and_unload as a whole model"),
        "arrow_config": refused("routes every token among several adapters"),
        "lora_dropout": harmless("of training; a new run's is lora.dropout"),
        "task_type": harmless("PEFT's class around the model"),
        "auto_mapping": harmless("the class that the adapter was made for"),
        "inference_mode": harmless("whether training continues"),
        "peft_version": harmless("the version that wrote it"),
        "revision": harmless("of the base model on the hub"),
        "corda_config": harmless("of an initialization, see init_lora_weights"),
        "eva_config": harmless("of an initialization, see init_lora_weights"),
        "loftq_config": harmless("of an initialization, see init_lora_weights"),
        "lora_ga_config": harmless("of an initialization, see init_lora_weights"),
        "megatron_config": harmless("of PEFT's own layers for Megatron"),
        "megatron_core": harmless("of PEFT's own layers for Megatron"),
        "qalora_group_size": harmless("of use_qalora, which is refused"),
        "runtime_config": harmless("how PEFT computes it"),
        "ensure_weight_tying": harmless("of adapters on embeddings, which are refused by their tensors"),
        "lora_dtype": harmless("the dtype of the adapter's computation, by ms-swift"),
        "lorap_lr_ratio": harmless("of ms-swift's optimizer"),
        "lorap_emb_lr": harmless("of ms-swift's optimizer"),
        "fan_in_fan_out": refused("weights stored transposed", False),
        "bias": refused("biases that were trained too", "none"),
        "rank_pattern": refused("other ranks for some layers", {}),
        "alpha_pattern": refused("other scales for some layers", {}),
        "layers_to_transform": refused("adapters on only some layers", []),
        "layers_pattern": refused("adapters on only some layers", []),
        "layer_replication": refused("layers that are repeated", []),
        "use_dora": refused("DoRA's magnitudes", False),
        "use_qalora": refused("adapters of pooled inputs", False),
        "use_bdlora": refused("block-diagonal adapters", False),
        "lora_bias": refused("a bias within the adapter", False),
        "target_parameters": refused("adapters of parameters that are not modules", []),
        "trainable_token_indices": refused("rows of the embedding that were trained too", [], {}),
        "alora_invocation_tokens": refused("an adapter that is active only after certain tokens", []),
        "velora_config": refused("VeLoRA's compressed activations"),
        "monteclora_config": refused("sampled adapters"),
        "kasa_config": refused("KaSA, which cuts the base's weights down"),
    })

TABLES: tuple[FileTable, ...] = (
    SENTENCE_BERT_CONFIG, CONFIG_SENTENCE_TRANSFORMERS, MODULES, POOLING, DENSE, NORMALIZE, MULTI_VECTOR_MASK,
    SPLADE_POOLING, TOKEN_DENSE, TOKEN_NORMALIZE, TOKENIZER_CONFIG, CONFIG, RERANKER_CONFIG, CONFIG_BLOCK, LOGIT_SCORE,
    ADAPTER_CONFIG)
"""All tables, in the order of the page."""


def flat_keys(keys: "dict[str, Key]", prefix: str = "") -> "dict[str, Key]":
    """Keys of a table by dotted name, those of nested objects after their object."""
    flat: dict[str, Key] = {}
    for name, key in keys.items():
        flat[f"{prefix}{name}"] = key
        if key.nested is not None:
            flat |= flat_keys(dict(key.nested), f"{prefix}{name}.")
    return flat

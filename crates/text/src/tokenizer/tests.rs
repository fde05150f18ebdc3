#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, sync::LazyLock};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::chat_template::ChatMessage;

const POCKET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/pocket");
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/golden.json");

/// The bundled checkpoint's tokenizer, loaded once.
pub(crate) fn pocket() -> &'static Tokenizer {
    static LOADED: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::load(Path::new(POCKET)).unwrap());
    &LOADED
}

fn golden() -> Value {
    serde_json::from_slice(&fs::read(GOLDEN).unwrap()).unwrap()
}

fn ids_of(value: &Value) -> Vec<TokenId> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as TokenId).collect()
}

impl Tokenizer {
    /// Hugging Face's own decode.
    pub(crate) fn reference_decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        self.bpe.decode(ids, skip_special).unwrap()
    }
}

#[test]
fn it_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Tokenizer>();
    shared::<ChatTemplate>();
    shared::<Detokenizer>();
}

mod golden_cases {
    use super::*;

    #[test]
    fn texts() {
        let cases = golden()["tokenizer"].as_array().unwrap().clone();
        assert!(cases.len() >= 12);
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let ids = ids_of(&case["ids"]);
            assert_eq!(pocket().encode(text, false).unwrap(), ids, "{text:?}");
            assert_eq!(pocket().decode(&ids, false), text);
        }
    }

    #[test]
    fn conversations() {
        let generations = golden()["generation"].as_array().unwrap().clone();
        assert_eq!(generations.len(), 4);
        for case in generations {
            let messages = [ChatMessage::text("user", case["prompt"].as_str().unwrap())];
            let template = pocket().chat_template().unwrap();
            let rendered = template.render(&messages, None, true, &Default::default()).unwrap();
            assert_eq!(rendered, case["rendered"].as_str().unwrap());
            let expected = ids_of(&case["prompt_ids"]);
            assert_eq!(pocket().encode(&rendered, false).unwrap(), expected);
            assert_eq!(pocket().encode(&rendered, true).unwrap(), expected, "one BOS, not two");
            let greedy = ids_of(&case["greedy_ids"]);
            assert_eq!(pocket().decode(&greedy, true), case["greedy_text"].as_str().unwrap());
            let ends = case["greedy_ids"].as_array().unwrap().len() < 96;
            assert_eq!(pocket().eos_ids().contains(greedy.last().unwrap()), ends);
        }
    }
}

#[test]
fn what_the_pocket_checkpoint_says() {
    let tokenizer = pocket();
    assert_eq!(tokenizer.vocab_size(), 4096);
    assert_eq!(tokenizer.bos_id(), Some(0));
    assert_eq!(tokenizer.eos_ids(), [1]);
    assert_eq!(tokenizer.special_tokens().pad_token.as_deref(), Some("<｜▁pad▁｜>"));
    assert_eq!(tokenizer.encode("hi", true).unwrap(), [0, 76, 77]);
    assert_eq!(tokenizer.encode("", true).unwrap(), [0]);
    let special: Vec<_> = tokenizer.special_texts().collect();
    assert_eq!(special.len(), 5);
    assert_eq!(special[3], (3, "<｜User｜>"));
    assert!(tokenizer.is_special(4) && !tokenizer.is_special(5));
    assert_eq!(tokenizer.token_bytes(225), Some(&b" "[..]));
    assert_eq!(tokenizer.token_bytes(167), Some(&[0xE6][..]), "the first byte of 日");
    assert_eq!(tokenizer.token_bytes(4096), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_text_survives_the_round_trip(text in any::<String>(), add_special: bool) {
        let ids = pocket().encode(&text, add_special).unwrap();
        prop_assert_eq!(pocket().decode(&ids, true), text.clone());
        let bytes: Vec<u8> = ids
            .iter()
            .filter(|&&id| !pocket().is_special(id))
            .flat_map(|&id| pocket().token_bytes(id).unwrap().to_vec())
            .collect();
        prop_assert_eq!(bytes, text.into_bytes());
    }

    #[test]
    fn decode_is_that_of_hugging_face(ids in prop::collection::vec(0..4096_u32, 0..50), skip: bool) {
        prop_assert_eq!(pocket().decode(&ids, skip), pocket().reference_decode(&ids, skip));
    }
}

/// A copy of the pocket checkpoint's text files with changes.
fn changed(file: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"] {
        fs::copy(Path::new(POCKET).join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join(file);
    let mut value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(&path, serde_json::to_vec(&value).unwrap()).unwrap();
    dir
}

fn load(dir: &TempDir) -> Result<Tokenizer, String> {
    Tokenizer::load(dir.path()).map_err(|error| error.to_string())
}

/// The error names the file and everything listed.
fn refused(dir: &TempDir, file: &str, mentions: &[&str]) {
    let error = load(dir).map(drop).unwrap_err();
    let path = dir.path().join(file).display().to_string();
    assert!(error.starts_with(&path), "{error} should begin with {path}");
    for mention in mentions {
        assert!(error.contains(mention), "{error} should mention {mention}");
    }
}

mod files_as_found {
    use super::*;

    #[test]
    fn added_token_objects_and_lists_of_eos() {
        let dir = changed("tokenizer_config.json", |config| {
            config["bos_token"] =
                json!({"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>", "lstrip": false});
            config["unk_token"] = Value::Null;
        });
        fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [4, 1, 4]}"#).unwrap();
        let tokenizer = load(&dir).unwrap();
        assert_eq!(tokenizer.bos_id(), Some(0));
        assert_eq!(tokenizer.eos_ids(), [1, 4]);
        assert_eq!(tokenizer.special_tokens().unk_token, None);
    }

    #[test]
    fn eos_falls_back_file_by_file() {
        let dir = changed("config.json", |config| config["eos_token_id"] = json!(3));
        assert_eq!(load(&dir).unwrap().eos_ids(), [1], "generation_config.json first");
        fs::write(dir.path().join("generation_config.json"), "{}").unwrap();
        assert_eq!(load(&dir).unwrap().eos_ids(), [3], "then config.json");
        fs::remove_file(dir.path().join("generation_config.json")).unwrap();
        fs::remove_file(dir.path().join("config.json")).unwrap();
        assert_eq!(load(&dir).unwrap().eos_ids(), [1], "then the tokenizer's own");
        let none = changed("tokenizer_config.json", |config| config["eos_token"] = Value::Null);
        fs::remove_file(none.path().join("generation_config.json")).unwrap();
        fs::write(none.path().join("config.json"), r#"{"eos_token_id": []}"#).unwrap();
        refused(&none, "config.json", &["eos_token_id", "tokenizer_config.json"]);
    }

    #[test]
    fn bos_as_configured() {
        let off = changed("tokenizer_config.json", |config| config["add_bos_token"] = json!(false));
        assert_eq!(load(&off).unwrap().encode("hi", true).unwrap(), [76, 77]);
        let absent = changed("tokenizer_config.json", |config| {
            config.as_object_mut().unwrap().remove("add_bos_token");
        });
        assert_eq!(load(&absent).unwrap().encode("hi", true).unwrap(), [0, 76, 77]);
        let eos = changed("tokenizer_config.json", |config| config["add_eos_token"] = json!(true));
        assert_eq!(load(&eos).unwrap().encode("hi", true).unwrap(), [0, 76, 77, 1]);
        assert_eq!(load(&eos).unwrap().encode("hi", false).unwrap(), [76, 77]);
    }

    #[test]
    fn truncation_and_padding_are_switched_off() {
        let dir = changed("tokenizer.json", |tokenizer| {
            tokenizer["truncation"] =
                json!({"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
            tokenizer["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 2, "pad_type_id": 0, "pad_token": "x"});
        });
        let text = "one two three four five six seven";
        assert_eq!(load(&dir).unwrap().encode(text, false).unwrap(), pocket().encode(text, false).unwrap());
    }

    #[test]
    fn templates_by_name_and_by_file() {
        let message = [ChatMessage::text("user", "hi")];
        let render = |tokenizer: &Tokenizer, tools: Option<&Value>| {
            let template = tokenizer.chat_template().unwrap();
            template.render(&message, tools, false, &Default::default()).unwrap()
        };
        let dir = changed("tokenizer_config.json", |config| {
            config["chat_template"] = json!([
                {"name": "tool_use", "template": "T{{ tools | length }}"},
                {"name": "default", "template": "D{{ messages[0].content }}{{ bos_token }}"},
                {"name": "rag", "template": "R"},
            ]);
        });
        let tokenizer = load(&dir).unwrap();
        assert_eq!(render(&tokenizer, None), "Dhi<｜begin▁of▁sentence｜>");
        assert_eq!(render(&tokenizer, Some(&json!([{}, {}]))), "T2");
        fs::write(dir.path().join("chat_template.jinja"), "F{{ messages[0].role }}\n").unwrap();
        assert_eq!(render(&load(&dir).unwrap(), None), "Fuser");
        let none = changed("tokenizer_config.json", |config| {
            config.as_object_mut().unwrap().remove("chat_template");
        });
        assert_eq!(load(&none).unwrap().chat_template().map(drop), Err(TemplateError::Missing));
    }
}

mod refusals {
    use super::*;

    #[test]
    fn missing_and_broken_files() {
        let kimi = changed("tokenizer.json", |_| ());
        fs::rename(kimi.path().join("tokenizer.json"), kimi.path().join("tiktoken.model")).unwrap();
        refused(&kimi, "tokenizer.json", &["tiktoken.model", "convert it to a tokenizer.json"]);
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let dir = changed(file, |_| ());
            fs::write(dir.path().join(file), b"{\"a\": ").unwrap();
            refused(&dir, file, &[]);
            fs::remove_file(dir.path().join(file)).unwrap();
            refused(&dir, file, &["cannot be read", "copy it unchanged"]);
        }
    }

    #[test]
    fn what_this_crate_cannot_reproduce() {
        let dir = changed("tokenizer.json", |tokenizer| tokenizer["decoder"] = json!({"type": "Fuse"}));
        refused(&dir, "tokenizer.json", &["decoder is not ByteLevel", "byte-level BPE"]);
        let dir = changed("tokenizer.json", |tokenizer| {
            tokenizer["model"] = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"});
        });
        refused(&dir, "tokenizer.json", &["not BPE"]);
        let dir = changed("tokenizer.json", |tokenizer| {
            tokenizer["model"]["vocab"]["wild"] = json!(4_000_000_000_u32);
        });
        refused(&dir, "tokenizer.json", &["4000000000"]);
    }

    #[test]
    fn fields_of_the_wrong_kind() {
        let cases = [
            ("bos_token", json!(5), "bos_token must be a string or an object with `content`, found 5"),
            ("bos_token", json!("<nope>"), "bos_token is \"<nope>\", which tokenizer.json does not know"),
            ("bos_token", Value::Null, "add_bos_token is true and bos_token is missing"),
            ("add_bos_token", json!("yes"), "add_bos_token must be true or false, found \"yes\""),
            ("chat_template", json!(3), "chat_template must be a string or a list, found 3"),
            ("chat_template", json!([{"name": "x"}]), "chat_template[0] needs the strings"),
            ("chat_template", json!([{"name": "x", "template": "y"}]), "no entry named `default`"),
        ];
        for (field, value, mention) in cases {
            let dir = changed("tokenizer_config.json", |config| config[field] = value);
            refused(&dir, "tokenizer_config.json", &[mention]);
        }
        let dir = changed("generation_config.json", |config| config["eos_token_id"] = json!([1, -1]));
        refused(
            &dir,
            "generation_config.json",
            &["eos_token_id must be a token id or a list of them, found [1,-1]"],
        );
    }
}

mod agreement {
    use cadre_types::ModelConfig;

    use super::*;

    fn config(change: impl FnOnce(&mut ModelConfig)) -> ModelConfig {
        let mut config = serde_json::from_str::<ModelConfig>(CONFIG).unwrap();
        change(&mut config);
        config
    }

    /// The pocket checkpoint's, as `ModelConfig` spells it.
    const CONFIG: &str = r#"{"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4,
        "num_nextn_predict_layers": 0, "first_k_dense_replace": 1, "intermediate_size": 128,
        "moe_intermediate_size": 64, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": true,
        "num_attention_heads": 4, "q_lora_rank": null, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
        "rope_theta": 10000.0, "rope_scaling": null, "quantization": null, "bos_token_id": 0,
        "eos_token_ids": [1]}"#;

    /// The problems and warnings, each as one line.
    fn surveyed(dir: &Path, config: &ModelConfig) -> [Vec<String>; 2] {
        let Survey { problems, warnings, .. } = survey(dir, config);
        // Loading for a model refuses exactly what is a problem.
        assert_eq!(Tokenizer::load_for(dir, config).is_ok(), problems.is_empty());
        [problems, warnings].map(|list| list.iter().map(ToString::to_string).collect())
    }

    #[track_caller]
    fn one(found: &[String], mentions: &[&str]) {
        assert_eq!(found.len(), 1, "{found:?}");
        for mention in mentions {
            assert!(found[0].contains(mention), "{mention:?} is not in {}", found[0]);
        }
    }

    #[test]
    fn the_pocket_checkpoint_agrees_with_itself() {
        let [problems, warnings] = surveyed(Path::new(POCKET), &config(|_| ()));
        assert!(problems.is_empty() && warnings.is_empty(), "{problems:?} {warnings:?}");
    }

    #[test]
    fn weights_alone_are_a_warning() {
        let empty = tempfile::tempdir().unwrap();
        let Survey { tokenizer, problems, warnings } = survey(empty.path(), &config(|_| ()));
        assert!(tokenizer.is_none() && problems.is_empty(), "{problems:?}");
        assert!(warnings.len() == 1 && warnings[0].fix.contains("router"), "{warnings:?}");
    }

    #[test]
    fn an_end_that_cannot_come_is_a_problem() {
        for (id, mention) in [(json!(4096), "vocab_size = 4096"), (json!([1, 999_999]), "999999")] {
            let dir = changed("generation_config.json", |fields| fields["eos_token_id"] = id);
            let [problems, _] = surveyed(dir.path(), &config(|_| ()));
            one(&problems, &["generation_config.json: eos_token_id", mention, "no answer would ever end"]);
        }
        // In the embedding, but no token: pocket's tokenizer ends at 4095.
        let dir = changed("generation_config.json", |fields| fields["eos_token_id"] = json!(4100));
        let [problems, _] = surveyed(dir.path(), &config(|config| config.vocab_size = 5000));
        one(&problems, &["eos_token_id", "a token that tokenizer.json has", "4100"]);
        let dir = changed("generation_config.json", |fields| fields["eos_token_id"] = json!(70));
        let [problems, warnings] = surveyed(dir.path(), &config(|_| ()));
        assert!(problems.is_empty(), "{problems:?}");
        one(&warnings, &["ordinary text", "eos_token_id"]);
    }

    #[test]
    fn a_token_without_an_embedding_is_a_problem() {
        let dir = changed("tokenizer.json", |tokenizer| {
            let mut token = tokenizer["added_tokens"][0].clone();
            token["id"] = json!(4096);
            token["content"] = json!("<|new|>");
            tokenizer["added_tokens"].as_array_mut().unwrap().push(token);
        });
        let [problems, _] = surveyed(dir.path(), &config(|_| ()));
        one(&problems, &["tokenizer.json: vocabulary", "vocab_size = 4096", "4096 \"<|new|>\""]);
    }

    #[test]
    fn files_that_name_tokens_differently() {
        let dir = changed("tokenizer_config.json", |fields| {
            fields["added_tokens_decoder"] = json!({
                "3": {"content": "<|other|>", "special": true},
                "4": {"content": pocket().special_texts().nth(4).unwrap().1, "special": false},
            });
        });
        let [problems, _] = surveyed(dir.path(), &config(|_| ()));
        one(&problems, &["added_tokens_decoder.3", "<|other|>", "<｜User｜>"]);
        let dir = changed("tokenizer_config.json", |fields| {
            let text = pocket().special_texts().nth(4).unwrap().1;
            fields["added_tokens_decoder"] = json!({"4": {"content": text, "special": false}});
        });
        let [problems, warnings] = surveyed(dir.path(), &config(|_| ()));
        assert!(problems.is_empty(), "{problems:?}");
        one(&warnings, &["added_tokens_decoder.4", "special: false"]);
        let [_, warnings] = surveyed(Path::new(POCKET), &config(|config| config.bos_token_id = 1));
        one(&warnings, &["bos_token", "bos_token_id = 1"]);
    }

    #[test]
    fn sampling_that_cannot_be_is_a_problem() {
        let dir = changed("generation_config.json", |fields| fields["top_p"] = json!(7));
        let [problems, _] = surveyed(dir.path(), &config(|_| ()));
        one(&problems, &["generation_config.json", "top_p", "7"]);
    }

    #[test]
    fn text_is_served_with_spaces_as_they_are() {
        let dir = changed("tokenizer_config.json", |fields| {
            fields["clean_up_tokenization_spaces"] = json!(true);
        });
        let [problems, warnings] = surveyed(dir.path(), &config(|_| ()));
        assert!(problems.is_empty(), "{problems:?}");
        one(&warnings, &["clean_up_tokenization_spaces", "set it to false"]);
    }

    #[test]
    fn a_template_that_cannot_be_used_is_a_warning_and_refuses_conversations() {
        for (source, mention) in [
            ("a\n{% if %}", "syntax error"),
            ("{{ messages[0].content|nofilter }}", "nofilter"),
            ("{% for m in messages %}{{ m.content.nomethod() }}{% endfor %}", "nomethod"),
        ] {
            let dir = changed("tokenizer_config.json", |fields| fields["chat_template"] = json!(source));
            let [problems, warnings] = surveyed(dir.path(), &config(|_| ()));
            assert!(problems.is_empty(), "{problems:?}");
            assert!(warnings.iter().any(|warning| warning.contains("only raw completions")), "{warnings:?}");
            let tokenizer = load(&dir).unwrap();
            let error = tokenizer.chat_template().map(drop).unwrap_err();
            assert!(
                matches!(&error, TemplateError::Unusable { reason } if reason.contains(mention)),
                "{error}"
            );
            assert_eq!(tokenizer.encode("hi", false).unwrap(), [76, 77]);
        }
        let dir = changed("tokenizer_config.json", |fields| {
            fields["chat_template"] =
                json!("<|im_start|>{{ messages[0].content }}<｜User｜>{% if x %}{{ 1|nofilter }}{% endif %}");
        });
        let [problems, warnings] = surveyed(dir.path(), &config(|_| ()));
        assert!(problems.is_empty() && warnings.len() == 2, "{problems:?} {warnings:?}");
        assert!(warnings[0].contains("nofilter") && warnings[1].contains("<|im_start|>"), "{warnings:?}");
    }
}

//! Where weights come from, and what of the configuration is changed on the way: `--weights` and `--override`.
//!
//! Every process of a model is told the same; the model hash covers both, and a process that was told otherwise is
//! refused with the words of [`WeightsOptions`]'s `Display`.

use std::{fmt, str::FromStr};

use serde_json::{Map, Value};

/// Where the weights of a model come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WeightsSource {
    /// The safetensors files of the folder.
    #[default]
    Files,
    /// Drawn: every element is a function of the seed, the tensor's name and the element's index. The folder needs
    /// no files but its configuration and tokenizer.
    Random {
        /// Keys every draw.
        seed: u64,
    },
}

impl fmt::Display for WeightsSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files => f.write_str("files"),
            Self::Random { seed } => write!(f, "random:{seed}"),
        }
    }
}

/// A word that names no source of weights.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no source of weights: give files or random:SEED, SEED a number below 2^64")]
pub struct UnknownSource(String);

impl FromStr for WeightsSource {
    type Err = UnknownSource;

    fn from_str(text: &str) -> Result<Self, UnknownSource> {
        if text == "files" {
            return Ok(Self::Files);
        }
        // Digits alone: `random:+1` would be another spelling of the same weights.
        let seed = text.strip_prefix("random:").filter(|seed| seed.bytes().all(|byte| byte.is_ascii_digit()));
        let seed = seed.and_then(|seed| seed.parse().ok());
        seed.map(|seed| Self::Random { seed }).ok_or_else(|| UnknownSource(text.to_owned()))
    }
}

/// Another value for a field of `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Override {
    /// The field; of a nested object with a dot (`rope_scaling.factor`).
    pub key: String,
    /// Its value.
    pub value: Value,
}

impl fmt::Display for Override {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.key, self.value)
    }
}

/// A text that is no override.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no override: give KEY=VALUE with a field of config.json, as n_routed_experts=16")]
pub struct NoOverride(String);

impl FromStr for Override {
    type Err = NoOverride;

    /// The value is JSON; what is none is text.
    fn from_str(text: &str) -> Result<Self, NoOverride> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() && !value.is_empty() => {
                let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
                Ok(Self { key: key.to_owned(), value })
            }
            _ => Err(NoOverride(text.to_owned())),
        }
    }
}

/// Where weights come from, and what is changed of the configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WeightsOptions {
    /// Where from.
    pub source: WeightsSource,
    /// Changes, in any order.
    pub overrides: Vec<Override>,
}

impl WeightsOptions {
    /// Files as they are.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// The seed of random weights.
    pub fn seed(&self) -> Option<u64> {
        match self.source {
            WeightsSource::Files => None,
            WeightsSource::Random { seed } => Some(seed),
        }
    }

    /// The changes, by field.
    pub fn sorted(&self) -> Vec<&Override> {
        let mut all: Vec<&Override> = self.overrides.iter().collect();
        all.sort_by(|a, b| a.key.cmp(&b.key));
        all
    }

    /// Command-line arguments that say the same.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        if self.source != WeightsSource::Files {
            arguments.extend(["--weights".to_owned(), self.source.to_string()]);
        }
        for change in &self.overrides {
            arguments.extend(["--override".to_owned(), change.to_string()]);
        }
        arguments
    }

    /// Applies the changes to a configuration; what is wrong with them is (field, expected, found).
    pub(crate) fn apply(&self, config: &mut Map<String, Value>) -> Vec<(String, String, String)> {
        let mut wrong = Vec::new();
        for (at, change) in self.overrides.iter().enumerate() {
            let Override { key, value } = change;
            if let Some(other) = self.overrides[..at].iter().find(|other| other.key == *key) {
                wrong.push((key.clone(), "one override of a field".into(), format!("{other} and {change}")));
                continue;
            }
            let (object, field) = match key.split_once('.') {
                None => (Some(&mut *config), key.as_str()),
                Some((outer, field)) => (config.get_mut(outer).and_then(Value::as_object_mut), field),
            };
            match object {
                Some(object) => drop(object.insert(field.to_owned(), value.clone())),
                None => wrong.push((
                    key.clone(),
                    "a field of an object that config.json has".into(),
                    change.to_string(),
                )),
            }
        }
        wrong
    }
}

impl fmt::Display for WeightsOptions {
    /// `files`, or `random:1 with n_routed_experts=16, num_hidden_layers=8`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        let changes: Vec<String> = self.sorted().iter().map(ToString::to_string).collect();
        if changes.is_empty() { Ok(()) } else { write!(f, " with {}", changes.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use serde_json::json;

    use super::*;

    #[test]
    fn sources_and_overrides_are_read_and_written() {
        for (text, source) in [
            ("files", WeightsSource::Files),
            ("random:0", WeightsSource::Random { seed: 0 }),
            ("random:18446744073709551615", WeightsSource::Random { seed: u64::MAX }),
        ] {
            assert_eq!(text.parse(), Ok(source));
            assert_eq!(source.to_string(), text);
        }
        for text in
            ["", "random", "random:", "random:-1", "random:+1", "random:18446744073709551616", "Files"]
        {
            let error = text.parse::<WeightsSource>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")) && error.contains("random:SEED"), "{error}");
        }
        for (text, value) in [
            ("a=16", json!(16)),
            ("a=1.5", json!(1.5)),
            ("a=true", json!(true)),
            ("a=null", json!(null)),
            ("a=[1,2]", json!([1, 2])),
            ("a=word", json!("word")),
        ] {
            let change: Override = text.parse().unwrap();
            assert_eq!((change.key.as_str(), &change.value), ("a", &value));
        }
        for text in ["", "a", "=1", "a="] {
            assert!(text.parse::<Override>().unwrap_err().to_string().contains("KEY=VALUE"));
        }
    }

    #[test]
    fn options_name_themselves_and_survive_a_command_line() {
        let overrides = ["num_hidden_layers=8", "n_routed_experts=16"].map(|text| text.parse().unwrap());
        let options =
            WeightsOptions { source: WeightsSource::Random { seed: 7 }, overrides: overrides.into() };
        assert_eq!(options.to_string(), "random:7 with n_routed_experts=16, num_hidden_layers=8");
        let arguments = options.arguments();
        assert_eq!(
            arguments,
            [
                "--weights",
                "random:7",
                "--override",
                "num_hidden_layers=8",
                "--override",
                "n_routed_experts=16"
            ]
        );
        assert_eq!(WeightsOptions::default().to_string(), "files");
        assert!(WeightsOptions::default().arguments().is_empty());
    }
}

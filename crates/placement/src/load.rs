//! Expert load: tokens per (layer, logical expert) over some window.
//!
//! JSON form, exported by the router's `/expert-load` and taken by `cadre up --expert-load FILE`:
//! ```json
//! {"layers": [{"layer": 1, "tokens": [120, 0, 33, 47]}, {"layer": 2, "tokens": [9, 81, 64, 46]}]}
//! ```
//! `layer` counts from 0 over main and MTP layers; layers ascend, and only layers with experts appear.
//! `tokens[e]` is how many (token, choice) pairs chose logical expert `e`; every layer has one count per
//! expert. Counts are integers, so that a load and its multiple give the same plan. Unknown fields are
//! refused. Only the ratio of counts within a layer matters to the planner.

use cadre_types::LayerId;
use serde::{Deserialize, Serialize};

/// Tokens that chose each expert, for every MoE layer. Checked on every way in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct ExpertLoad {
    layers: Vec<LayerLoad>,
}

/// The load of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerLoad {
    /// The layer.
    pub layer: LayerId,
    /// Tokens per logical expert.
    pub tokens: Vec<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unchecked {
    layers: Vec<LayerLoad>,
}

impl TryFrom<Unchecked> for ExpertLoad {
    type Error = LoadError;

    fn try_from(unchecked: Unchecked) -> Result<Self, LoadError> {
        Self::new(unchecked.layers)
    }
}

impl ExpertLoad {
    /// A load: at least one layer, layers ascending, each with the same number of experts, at least one.
    pub fn new(layers: Vec<LayerLoad>) -> Result<Self, LoadError> {
        let first = layers.first().ok_or(LoadError::NoLayers)?;
        let num_experts = first.tokens.len();
        if num_experts == 0 {
            return Err(LoadError::NoExperts { layer: first.layer });
        }
        if let Some(pair) = layers.windows(2).find(|pair| pair[0].layer >= pair[1].layer) {
            return Err(LoadError::LayerOrder { layer: pair[1].layer });
        }
        match layers.iter().find(|layer| layer.tokens.len() != num_experts) {
            Some(odd) => Err(LoadError::ExpertCount {
                layer: odd.layer,
                expected: num_experts,
                found: odd.tokens.len(),
            }),
            None => Ok(Self { layers }),
        }
    }

    /// One token per expert: what to plan with before anything has been measured.
    pub fn uniform(layers: impl IntoIterator<Item = LayerId>, num_experts: usize) -> Result<Self, LoadError> {
        let layers = layers.into_iter();
        Self::new(layers.map(|layer| LayerLoad { layer, tokens: vec![1; num_experts] }).collect())
    }

    /// The load of the other layers.
    pub fn without(mut self, left_out: impl Fn(LayerId) -> bool) -> Result<Self, LoadError> {
        self.layers.retain(|load| !left_out(load.layer));
        Self::new(self.layers)
    }

    /// The layers, ascending; at least one.
    pub fn layers(&self) -> &[LayerLoad] {
        &self.layers
    }

    /// Routed experts per layer; at least one.
    pub fn num_experts(&self) -> usize {
        self.layers[0].tokens.len()
    }

    /// Tokens per expert of one layer.
    pub fn layer(&self, layer: LayerId) -> Option<&[u64]> {
        let at = self.layers.binary_search_by_key(&layer, |load| load.layer).ok()?;
        Some(&self.layers[at].tokens)
    }

    /// Refuses a load that is not about exactly these layers and experts: one measured on another model.
    pub fn check_model(
        &self,
        moe_layers: impl IntoIterator<Item = LayerId>,
        num_experts: usize,
    ) -> Result<(), LoadError> {
        let expected: Vec<LayerId> = moe_layers.into_iter().collect();
        if self.num_experts() != num_experts {
            return Err(LoadError::ExpertCount {
                layer: self.layers[0].layer,
                expected: num_experts,
                found: self.num_experts(),
            });
        }
        if let Some(&layer) = expected.iter().find(|&&layer| self.layer(layer).is_none()) {
            return Err(LoadError::MissingLayer { layer });
        }
        match self.layers.iter().find(|load| !expected.contains(&load.layer)) {
            Some(load) => Err(LoadError::NotMoeLayer { layer: load.layer }),
            None => Ok(()),
        }
    }
}

/// Why numbers are not an expert load.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// No layer at all.
    #[error("expert load: there are no layers")]
    NoLayers,
    /// A layer without experts.
    #[error("expert load of {layer}: there are no experts")]
    NoExperts {
        /// The layer.
        layer: LayerId,
    },
    /// Layers are not strictly ascending.
    #[error("expert load: {layer} is out of order or given twice")]
    LayerOrder {
        /// The offending layer.
        layer: LayerId,
    },
    /// A layer has another number of experts than expected.
    #[error("expert load of {layer}: {found} experts, expected {expected}")]
    ExpertCount {
        /// The layer.
        layer: LayerId,
        /// Experts of the model, or of the first layer.
        expected: usize,
        /// Counts given.
        found: usize,
    },
    /// A layer with experts has no counts.
    #[error("expert load: {layer} of the model is missing")]
    MissingLayer {
        /// The layer.
        layer: LayerId,
    },
    /// Counts for a layer that the model has not, or that has no experts.
    #[error("expert load: {layer} is no expert layer of the model")]
    NotMoeLayer {
        /// The layer.
        layer: LayerId,
    },
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn layer(layer: u16, tokens: &[u64]) -> LayerLoad {
        LayerLoad { layer: LayerId(layer), tokens: tokens.to_vec() }
    }

    fn parse(json: &str) -> Result<ExpertLoad, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn the_documented_json_round_trips() {
        let json = r#"{"layers":[{"layer":1,"tokens":[120,0,33,47]},{"layer":2,"tokens":[9,81,64,46]}]}"#;
        let load = parse(json).unwrap();
        assert_eq!(load.layer(LayerId(2)), Some([9, 81, 64, 46].as_slice()));
        assert_eq!(load.layer(LayerId(3)), None);
        assert_eq!(serde_json::to_string(&load).unwrap(), json);
    }

    #[test]
    fn bad_json_names_the_fault() {
        let refused = |json: &str, words: &str| {
            let error = parse(json).unwrap_err();
            assert!(error.contains(words), "{error}");
        };
        refused(r#"{"layers":[]}"#, "there are no layers");
        refused(r#"{"layers":[{"layer":1,"tokens":[]}]}"#, "layer 1: there are no experts");
        refused(
            r#"{"layers":[{"layer":2,"tokens":[1]},{"layer":2,"tokens":[1]}]}"#,
            "layer 2 is out of order or given twice",
        );
        refused(
            r#"{"layers":[{"layer":1,"tokens":[1,2]},{"layer":2,"tokens":[1]}]}"#,
            "layer 2: 1 experts, expected 2",
        );
        refused(r#"{"layers":[{"layer":1,"tokens":[-1]}]}"#, "invalid value");
        refused(r#"{"layers":[{"layer":1,"tokens":[1.5]}]}"#, "invalid type");
        refused(r#"{"layers":[{"layer":1,"tokens":[1]}],"window":3}"#, "unknown field `window`");
    }

    #[test]
    fn a_load_of_another_model_is_refused() {
        let load = ExpertLoad::new(vec![layer(1, &[1, 2]), layer(2, &[3, 4])]).unwrap();
        let check = |layers: std::ops::Range<u16>, experts| {
            load.check_model(layers.map(LayerId), experts).map_err(|error| error.to_string())
        };
        assert_eq!(check(1..3, 2), Ok(()));
        assert_eq!(check(1..3, 3).unwrap_err(), "expert load of layer 1: 2 experts, expected 3");
        assert_eq!(check(1..4, 2).unwrap_err(), "expert load: layer 3 of the model is missing");
        assert_eq!(check(2..3, 2).unwrap_err(), "expert load: layer 1 is no expert layer of the model");
    }

    #[test]
    fn uniform_is_one_token_each() {
        let load = ExpertLoad::uniform((3..5).map(LayerId), 4).unwrap();
        assert_eq!(load.layers(), [layer(3, &[1; 4]), layer(4, &[1; 4])]);
        assert_eq!(ExpertLoad::uniform([], 4), Err(LoadError::NoLayers));
    }
}

//! Limits of the processes as fields: what is a flag of `cadre router`, `cadre worker` and `cadre expert`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Limits of the router; the program's own where a field is absent (docs/cli.md).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RouterLimits {
    /// Sequences generated at one time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_concurrent: Option<i32>,
    /// Requests that may wait beyond those; more are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_waiting: Option<i32>,
    /// Largest request in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1024, max = 1_073_741_824))]
    pub max_body_bytes: Option<i32>,
    /// Deadline of a request that brings none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub default_timeout_seconds: Option<i32>,
    /// Longest deadline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub max_timeout_seconds: Option<i32>,
    /// Longest wait for a worker to reserve pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub reserve_timeout_seconds: Option<i32>,
    /// Longest silence of the workers of a request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub stall_timeout_seconds: Option<i32>,
}

/// Limits of workers; the program's own where a field is absent (docs/cli.md).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerLimits {
    /// Most rows of a step, decode rows and prompt tokens together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_step_tokens: Option<i32>,
    /// Compute threads; what the container allows if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub threads: Option<i32>,
    /// How long a shard may take to answer a frame before its pairs go to another copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub dispatch_timeout_seconds: Option<i32>,
    /// How long an expert without a live copy is waited for before its sequences fail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub uncovered_timeout_seconds: Option<i32>,
    /// A hand-off in which nothing moves for so long has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub handoff_timeout_seconds: Option<i32>,
    /// How long a hand-off may wait for its prefill worker to begin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub handoff_begin_timeout_seconds: Option<i32>,
}

/// Limits of shards.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExpertLimits {
    /// Compute threads; what the container allows if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub threads: Option<i32>,
}

fn flags<const N: usize>(values: [(&'static str, Option<i32>); N]) -> Vec<String> {
    let given = values.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value?.to_string()]));
    given.flatten().collect()
}

impl RouterLimits {
    /// The flags of `cadre router`.
    pub fn flags(&self) -> Vec<String> {
        flags([
            ("--max-concurrent", self.max_concurrent),
            ("--max-waiting", self.max_waiting),
            ("--max-body-bytes", self.max_body_bytes),
            ("--default-timeout", self.default_timeout_seconds),
            ("--max-timeout", self.max_timeout_seconds),
            ("--reserve-timeout", self.reserve_timeout_seconds),
            ("--stall-timeout", self.stall_timeout_seconds),
        ])
    }
}

impl WorkerLimits {
    /// The flags of `cadre worker`.
    pub fn flags(&self) -> Vec<String> {
        flags([
            ("--max-step-tokens", self.max_step_tokens),
            ("--threads", self.threads),
            ("--dispatch-timeout", self.dispatch_timeout_seconds),
            ("--uncovered-timeout", self.uncovered_timeout_seconds),
            ("--handoff-timeout", self.handoff_timeout_seconds),
            ("--handoff-begin-timeout", self.handoff_begin_timeout_seconds),
        ])
    }
}

impl ExpertLimits {
    /// The flags of `cadre expert`.
    pub fn flags(&self) -> Vec<String> {
        flags([("--threads", self.threads)])
    }
}

macro_rules! absent_by_default {
    ($($limits:ident)+) => {
        $(impl $limits {
            pub(super) fn is_default(&self) -> bool {
                *self == Self::default()
            }
        })+
    };
}
absent_by_default!(RouterLimits WorkerLimits ExpertLimits);

//! The report as text for a terminal.

use std::fmt;

use cadre_types::ModelConfig;

use super::{LayoutTotals, Report, Totals};
use crate::problem::Problems;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "checkpoint    {}", self.dir)?;
        if let Some(config) = &self.config {
            architecture(f, config)?;
        }
        let found = &self.found;
        let unread = found.shard_files - found.shard_files_read;
        write!(
            f,
            "files         {} tensors in {} shards",
            count(found.tensors as u64),
            count(found.shard_files as u64)
        )?;
        writeln!(f, "{}", if unread > 0 { format!(", {unread} of them unreadable") } else { String::new() })?;
        writeln!(
            f,
            "              {} elements ({} of them F32 scales), {}",
            count(found.elements),
            count(found.scale_elements),
            size(found.bytes)
        )?;
        if let Some(totals) = &self.totals {
            parameters(f, totals)?;
            tiers(f, totals)?;
        }
        if let Some(layout) = &self.layout {
            shards(f, layout)?;
        }
        if let Some(hash) = &self.model_hash {
            writeln!(f, "model hash    {hash}")?;
        }
        for default in &self.defaults {
            writeln!(f, "default       {} = {} (absent from config.json)", default.field, default.value)?;
        }
        findings(f, "warning", &self.warnings)?;
        findings(f, "problem", &self.problems)?;
        match (self.problems.total(), self.verified) {
            (0, true) => write!(f, "verified      every tensor, shape, dtype and number is in order"),
            (0, false) => write!(
                f,
                "checked       every tensor, shape and dtype is in order (numbers are not read without --verify)"
            ),
            (total, _) => write!(f, "problems      {total}: this checkpoint cannot be served"),
        }
    }
}

fn architecture(f: &mut fmt::Formatter<'_>, config: &ModelConfig) -> fmt::Result {
    let weights = if config.quantization.is_some() { "FP8 e4m3, 128x128 blocks" } else { "BF16" };
    writeln!(
        f,
        "model         {} layers ({} dense) + {} MTP, hidden {}, {} heads, vocabulary {}, context {}, weights {weights}",
        config.num_hidden_layers,
        config.first_k_dense_replace,
        config.num_nextn_predict_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.vocab_size,
        config.max_position_embeddings,
    )?;
    writeln!(
        f,
        "experts       {} routed ({} per token, {} of {} groups) + {} shared per MoE layer",
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.topk_group,
        config.n_group,
        config.n_shared_experts,
    )
}

fn parameters(f: &mut fmt::Formatter<'_>, totals: &Totals) -> fmt::Result {
    writeln!(
        f,
        "parameters    {} main, {} only in MTP, {} active per token",
        billions(totals.main_params),
        billions(totals.mtp_params),
        billions(totals.active_params)
    )?;
    let kv = &totals.kv;
    writeln!(
        f,
        "KV per token  {} B in bf16 ({} B with MTP), {} B in f32 ({} B with MTP)",
        count(kv.bf16),
        count(kv.bf16_with_mtp),
        count(kv.f32),
        count(kv.f32_with_mtp)
    )
}

fn tiers(f: &mut fmt::Formatter<'_>, totals: &Totals) -> fmt::Result {
    for tier in &totals.tiers {
        let name = tier.tier.name();
        writeln!(f, "  {name:<46} {:>12} {:>12}", billions(tier.params), size(tier.bytes))?;
    }
    writeln!(f, "worker        {} of weights each", size(totals.worker_bytes))?;
    writeln!(
        f,
        "experts       {} in all, {} per expert and layer, {} MoE layers",
        size(totals.expert_bytes),
        size(totals.bytes_per_expert),
        totals.moe_layers
    )?;
    match totals.idle_expert_bytes {
        0 => Ok(()),
        idle => writeln!(
            f,
            "              {} more of the MTP layer are not loaded: nothing drafts with it",
            size(idle)
        ),
    }
}

/// Shards with equal loads share a line.
fn shards(f: &mut fmt::Formatter<'_>, layout: &LayoutTotals) -> fmt::Result {
    let mut first = 0;
    for group in layout.shards.chunk_by(|a, b| a == b) {
        let last = first + group.len() - 1;
        let range = if first == last { format!("shard {first}") } else { format!("shards {first}-{last}") };
        writeln!(f, "  {range:<46} {:>6} slots {:>12}", group[0].slots_per_layer, size(group[0].bytes))?;
        first = last + 1;
    }
    Ok(())
}

fn findings(f: &mut fmt::Formatter<'_>, label: &str, problems: &Problems) -> fmt::Result {
    for problem in problems {
        writeln!(f, "{label:<13} {problem}")?;
    }
    match problems.total() - problems.iter().len() {
        0 => Ok(()),
        omitted => writeln!(f, "{label:<13} … and {omitted} more"),
    }
}

/// Digits in groups of three.
fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut grouped = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

fn billions(params: u64) -> String {
    match params {
        0..1_000_000 => count(params),
        1_000_000..1_000_000_000 => format!("{:.2} M", params as f64 / 1e6),
        _ => format!("{:.2} B", params as f64 / 1e9),
    }
}

fn size(bytes: u64) -> String {
    const UNITS: [(&str, u64, usize); 3] = [("GiB", 1 << 30, 3), ("MiB", 1 << 20, 1), ("KiB", 1 << 10, 1)];
    match UNITS.into_iter().find(|unit| bytes >= unit.1) {
        Some((name, unit, places)) => format!("{:.places$} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} B"),
    }
}

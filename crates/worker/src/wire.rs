//! Worker messages to the engine's types and back.

use std::time::{Duration, Instant};

use cadre_engine::{GeneratedToken, HandoffOffer, KvFinish, KvRows};
use cadre_ops::RowFormat;
use cadre_proto::{convert::ConvertError, v1};
use cadre_types::LayerId;
use tonic::{Status, metadata::MetadataMap};

/// Version of the KV format that this process writes and reads.
pub(crate) const KV_FORMAT_VERSION: u32 = 1;

/// The deadline that the caller's `grpc-timeout` header sets, if it sends one.
pub(crate) fn deadline(metadata: &MetadataMap) -> Result<Option<Instant>, Status> {
    let Some(header) = metadata.get("grpc-timeout") else { return Ok(None) };
    let timeout = header.to_str().ok().and_then(parse_timeout).ok_or_else(|| {
        Status::invalid_argument(format!(
            "grpc-timeout {header:?}: expected up to 8 digits and one of HMSmun"
        ))
    })?;
    // A deadline beyond the clock is none.
    Ok(Instant::now().checked_add(timeout))
}

fn parse_timeout(header: &str) -> Option<Duration> {
    let (digits, unit) = header.split_at_checked(header.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

pub(crate) fn token(token: GeneratedToken) -> v1::GeneratedToken {
    v1::GeneratedToken {
        position: token.position,
        token: token.token,
        logprob: token.logprob,
        top: token.top.into_iter().map(|(token, logprob)| v1::TokenLogprob { token, logprob }).collect(),
    }
}

fn token_from(wire: v1::GeneratedToken) -> GeneratedToken {
    GeneratedToken {
        position: wire.position,
        token: wire.token,
        logprob: wire.logprob,
        top: wire.top.into_iter().map(|likely| (likely.token, likely.logprob)).collect(),
    }
}

pub(crate) fn dtype(format: RowFormat) -> v1::Dtype {
    match format {
        RowFormat::F32 => v1::Dtype::F32,
        RowFormat::Bf16 => v1::Dtype::Bf16,
        RowFormat::E4m3 => v1::Dtype::E4m3,
    }
}

fn format(value: i32) -> Result<RowFormat, ConvertError> {
    match v1::Dtype::try_from(value) {
        Ok(v1::Dtype::F32) => Ok(RowFormat::F32),
        Ok(v1::Dtype::Bf16) => Ok(RowFormat::Bf16),
        Ok(v1::Dtype::E4m3) => Ok(RowFormat::E4m3),
        Ok(v1::Dtype::Unspecified) | Err(_) => {
            Err(ConvertError::UnknownEnum { field: "kv_begin.dtype", value })
        }
    }
}

/// An offer, its generation aside.
pub(crate) fn offer(begin: &v1::KvBegin) -> Result<HandoffOffer, ConvertError> {
    if begin.format_version != KV_FORMAT_VERSION {
        return Err(ConvertError::Invalid {
            field: "kv_begin.format_version",
            problem: format!("{}, this worker reads {KV_FORMAT_VERSION}", begin.format_version),
        });
    }
    Ok(HandoffOffer {
        request_id: begin.request_id.clone(),
        prompt_tokens: begin.prompt_tokens,
        prompt_hash: begin.prompt_hash,
        layers: begin.layers,
        row_width: begin.row_width,
        format: format(begin.dtype)?,
    })
}

pub(crate) fn rows(rows: KvRows) -> v1::KvFrame {
    frame(v1::kv_frame::Frame::Rows(v1::KvRows {
        layer: u32::from(rows.layer.0),
        first_position: rows.first_position,
        count: rows.count,
        rows: rows.rows,
    }))
}

pub(crate) fn rows_from(wire: v1::KvRows) -> Result<KvRows, ConvertError> {
    let layer = u16::try_from(wire.layer).map_err(|_| ConvertError::Invalid {
        field: "kv_rows.layer",
        problem: format!("{} is out of range", wire.layer),
    })?;
    Ok(KvRows {
        layer: LayerId(layer),
        first_position: wire.first_position,
        count: wire.count,
        rows: wire.rows,
    })
}

pub(crate) fn finish(finish: KvFinish) -> v1::KvFrame {
    frame(v1::kv_frame::Frame::Finish(v1::KvFinish { first_token: Some(token(finish.first_token)) }))
}

pub(crate) fn finish_from(wire: v1::KvFinish) -> Result<KvFinish, ConvertError> {
    let first_token = cadre_proto::convert::required(wire.first_token, "kv_finish.first_token")?;
    Ok(KvFinish { first_token: token_from(first_token) })
}

pub(crate) fn frame(frame: v1::kv_frame::Frame) -> v1::KvFrame {
    v1::KvFrame { frame: Some(frame) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_as_grpc_writes_them() {
        assert_eq!(parse_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse_timeout("0n"), Some(Duration::ZERO));
        for bad in ["", "5", "m", "-1S", "123456789S", "5s", "5ß"] {
            assert_eq!(parse_timeout(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_malformed_timeout_is_refused_and_named() {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", "soon".parse().expect("an ASCII header"));
        let status = deadline(&metadata).expect_err("refused");
        assert!(status.message().contains("soon"), "{}", status.message());
    }

    #[test]
    fn a_finish_survives_the_wire() {
        let sent = KvFinish {
            first_token: GeneratedToken {
                position: 9,
                token: 3,
                logprob: Some(-0.5),
                top: vec![(3, -0.5), (4, -1.5)],
            },
        };
        let Some(v1::kv_frame::Frame::Finish(wire)) = finish(sent.clone()).frame else {
            panic!("a finish frame");
        };
        assert_eq!(finish_from(wire), Ok(sent));
        let torn = v1::KvFinish::default();
        assert!(finish_from(torn).is_err_and(|error| error.to_string().contains("first_token")));
    }

    #[test]
    fn another_format_version_is_refused() {
        let begin = v1::KvBegin { format_version: 2, dtype: v1::Dtype::Bf16.into(), ..Default::default() };
        assert!(offer(&begin).is_err_and(|error| error.to_string().contains("this worker reads 1")));
    }
}

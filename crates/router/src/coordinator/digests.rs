//! What the weights of this model's members are, byte by byte: the first word on each part counts.
//!
//! The model hash samples files; weights that were changed between the samples, or on one machine only, have the same
//! hash and give other text. Every member reads its bytes anyway and reports a digest of them. Two members that differ
//! cannot both serve, so the later one is refused, and so is a restarted one that reads something else than before:
//! digests are kept for as long as the coordinator lives.
//!
//! Memory: an entry is some 40 bytes; V3 has 58 layers of 256 experts, 600 KB.

use std::{collections::BTreeMap, sync::Arc};

use cadre_types::{LayerId, LogicalExpert, MemberId};

/// What a report says of the bytes that a member holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ReportedDigests {
    /// Experts of a shard.
    pub(super) experts: Vec<(LayerId, LogicalExpert, u64)>,
    /// Everything but routed experts, of a worker; `None` before it is loaded.
    pub(super) weights: Option<u64>,
}

/// Two members whose bytes differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what}: member {id} has read bytes with digest {digest:016x}, member {first} such with {expected:016x}: their \
     files differ or were changed in place; give every process the same checkpoint and restart the router and all of them"
)]
pub(super) struct DigestMismatch {
    what: String,
    id: MemberId,
    digest: u64,
    first: MemberId,
    expected: u64,
}

#[derive(Clone, Debug)]
struct Known {
    digest: u64,
    first: Arc<MemberId>,
}

/// Everything that was said first.
#[derive(Debug, Default)]
pub(super) struct Digests {
    experts: BTreeMap<(LayerId, LogicalExpert), Known>,
    weights: Option<Known>,
}

impl Digests {
    /// Whether a member has read what others have.
    pub(super) fn check(&self, id: &MemberId, reported: &ReportedDigests) -> Result<(), DigestMismatch> {
        let same = |known: Option<&Known>, digest: u64, what: &dyn Fn() -> String| match known {
            Some(known) if known.digest != digest => Err(DigestMismatch {
                what: what(),
                id: id.clone(),
                digest,
                first: MemberId::clone(&known.first),
                expected: known.digest,
            }),
            _ => Ok(()),
        };
        for &(layer, expert, digest) in &reported.experts {
            same(self.experts.get(&(layer, expert)), digest, &|| format!("{expert} of {layer}"))?;
        }
        match reported.weights {
            Some(digest) => same(self.weights.as_ref(), digest, &|| "weights of workers".to_owned()),
            None => Ok(()),
        }
    }

    /// Remembers what nobody has said before.
    pub(super) fn note(&mut self, id: &MemberId, reported: &ReportedDigests) {
        let first = Arc::new(id.clone());
        for &(layer, expert, digest) in &reported.experts {
            let known = || Known { digest, first: Arc::clone(&first) };
            self.experts.entry((layer, expert)).or_insert_with(known);
        }
        if let Some(digest) = reported.weights {
            self.weights.get_or_insert(Known { digest, first });
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn experts(digests: &[(u16, u16, u64)]) -> ReportedDigests {
        let of = |&(layer, expert, digest): &(u16, u16, u64)| (LayerId(layer), LogicalExpert(expert), digest);
        ReportedDigests { experts: digests.iter().map(of).collect(), weights: None }
    }

    #[test]
    fn copies_that_differ_are_named_with_both_members_and_both_digests() {
        let mut digests = Digests::default();
        let (a, b) = (MemberId("shard-0".into()), MemberId("shard-1".into()));
        digests.check(&a, &experts(&[(3, 0, 7), (3, 1, 8)])).unwrap();
        digests.note(&a, &experts(&[(3, 0, 7), (3, 1, 8)]));
        digests.check(&b, &experts(&[(3, 1, 8), (4, 0, 9)])).unwrap();
        digests.note(&b, &experts(&[(3, 1, 8), (4, 0, 9)]));
        let error = digests.check(&b, &experts(&[(4, 0, 9), (3, 0, 0xbad)])).unwrap_err().to_string();
        for words in ["expert 0 of layer 3", "shard-1", "0000000000000bad", "shard-0", "0000000000000007"] {
            assert!(error.contains(words), "{error} lacks {words}");
        }
        // One that reads something else after a restart, too: the first word counts.
        let again = MemberId("shard-0-again".into());
        digests.check(&again, &experts(&[(3, 0, 6)])).unwrap_err();
        digests.check(&again, &experts(&[(3, 0, 7)])).unwrap();
    }

    #[test]
    fn workers_have_one_digest_for_all() {
        let mut digests = Digests::default();
        let weights = |digest| ReportedDigests { experts: Vec::new(), weights: Some(digest) };
        let (a, b) = (MemberId("a".into()), MemberId("b".into()));
        digests.note(&a, &ReportedDigests::default());
        digests.check(&b, &weights(5)).unwrap();
        digests.note(&b, &weights(5));
        digests.check(&a, &weights(5)).unwrap();
        let error = digests.check(&a, &weights(6)).unwrap_err().to_string();
        assert!(error.starts_with("weights of workers: member a"), "{error}");
    }
}
